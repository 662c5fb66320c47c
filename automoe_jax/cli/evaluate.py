"""Scores an export: sacreBLEU and chrF with signatures, and BLEU as HAT and AutoMoE publish it.

python launch/evaluate.py --export=runs/quickstart/export --workdir=runs/quickstart --split=test
python launch/evaluate.py --export=DIR --source=test.en --reference=test.de
"""

import dataclasses
import os
from pathlib import Path

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.decoding import evaluation
from automoe_jax.decoding.translator import Translator
from automoe_jax.phases.prepare import stored_split
from automoe_jax.system import bucket, files, malloc
from automoe_jax.system.errors import UserError

_EXPORT = flags.DEFINE_string("export", None, "export folder")
_WORKDIR = flags.DEFINE_string("workdir", None, "run whose corpus to score on")
_SPLIT = flags.DEFINE_string("split", "test", "split of the run's corpus")
_SOURCE = flags.DEFINE_string("source", None, "text to translate, in place of a corpus")
_REFERENCE = flags.DEFINE_string("reference", None, "its reference translation")
_LIMIT = flags.DEFINE_integer("limit", 0, "most sentences; 0 for all")
_LOWERCASE = flags.DEFINE_bool("lowercase", False, "score without regard to case")
_BEAM, _PENALTY = options.define_beam()
_KERNELS = options.define_kernels()
_OUTPUT = flags.DEFINE_string("output", None, "file for the translations")
_JSON = options.define_json("print the scores as one JSON line")


def main():
    if not _EXPORT.value:
        raise UserError("--export is missing; give an export folder")
    files_given = [f.value is not None for f in (_SOURCE, _REFERENCE)]
    if any(files_given) != all(files_given) or any(files_given) == (_WORKDIR.value is not None):
        raise UserError("give either --workdir, or --source and --reference together")
    options.refuse_beside(_SOURCE, _SPLIT)
    if _LIMIT.value < 0:
        raise UserError(f"--limit is {_LIMIT.value}; it cannot be negative")
    if _OUTPUT.value and Path(_OUTPUT.value).is_dir():
        raise UserError(f"--output {_OUTPUT.value} is a folder; name a file")
    for given in (_SOURCE.value, _REFERENCE.value):
        if given and _OUTPUT.value and os.path.realpath(given) == os.path.realpath(_OUTPUT.value):
            raise UserError(f"--output {_OUTPUT.value} is read here; name another file")
    malloc.return_large_blocks()
    translator = Translator.load(_EXPORT.value, kernels=_KERNELS.value, release_memory=malloc.trim)
    if _WORKDIR.value is None:
        texts = [files.read_text(f.value or "", f.name) for f in (_SOURCE, _REFERENCE)]
        sources, references = ([t.strip() for t in files.lines(text)] for text in texts)
        if len(sources) != len(references):
            raise UserError(
                f"{_SOURCE.value} has {len(sources)} lines but {_REFERENCE.value} has "
                f"{len(references)}; the same number is needed"
            )
        if _LIMIT.value:
            sources, references = sources[: _LIMIT.value], references[: _LIMIT.value]
    else:
        split = stored_split(bucket.folder_of(_WORKDIR.value), _SPLIT.value)
        sources, references = evaluation.read_split(split, _LIMIT.value)
    task = terminal.TerminalProgress().task("translating", len(sources))
    settings = _BEAM.value, _PENALTY.value, lambda done, total: task.update(done)
    scores, translations = evaluation.evaluate(
        translator, sources, references, *settings, lowercase=_LOWERCASE.value
    )
    task.close()
    if _OUTPUT.value:
        files.write_text(_OUTPUT.value, "".join(t + "\n" for t in translations))
    if _JSON.value:
        terminal.print_json(dataclasses.asdict(scores))
        return
    print(f"BLEU {scores.bleu:.2f}  {scores.bleu_signature}")
    print(f"chrF {scores.chrf:.2f}  {scores.chrf_signature}")
    tokenized = f"BLEU {scores.tokenized_bleu:.2f}  {scores.tokenized_bleu_signature}"
    print(f"{tokenized} (tokenised, as HAT and AutoMoE publish it)")
    print(f"{scores.sentences:,} sentences")
