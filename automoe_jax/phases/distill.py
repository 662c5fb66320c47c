"""A corpus of a teacher's translations: sequence-level distillation (Kim & Rush 2016).

The corpus is a folder of parallel text, which `data.path` takes.
"""

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from automoe_jax.config import DISTILL_CHOICES
from automoe_jax.data.corpus import Split
from automoe_jax.data.parallel_text import LinePair
from automoe_jax.data.tokens import text_or_none
from automoe_jax.decoding.manifest import read_manifest
from automoe_jax.decoding.translator import Translation, Translator
from automoe_jax.phases.run import Run
from automoe_jax.system import files, malloc, workdir
from automoe_jax.system.errors import UserError

KIND = "distilled corpus"
CHUNK = 2048  # pairs that are translated at a time: what a killed run repeats
_PARTS = "parts"  # folder of what is translated so far
_COUNTS = "distilled.json"  # written last


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a teacher's translations become a corpus.

    Attributes:
      beam_size, length_penalty: of the teacher's search, see `Translator.translate`.
      choice: "best" takes the teacher's best hypothesis, "nearest" the one of its beam with the
        highest sentence BLEU against the reference (sequence-level interpolation, Kim & Rush 2016,
        arXiv 1606.07947, section 3.3).
      n_best: with "best", hypotheses of a sentence that become pairs, from the best.
      original: True to put the pairs of the original text beside them.
    """

    beam_size: int = 5
    length_penalty: float = 0.6
    choice: str = "best"
    n_best: int = 1
    original: bool = True

    def __post_init__(self):
        if self.choice not in DISTILL_CHOICES:
            raise UserError(f"--choice is {self.choice!r}; allowed: {', '.join(DISTILL_CHOICES)}")
        if not 1 <= self.n_best <= self.beam_size:
            raise UserError(f"--n_best is {self.n_best}; allowed: 1 to the beam, {self.beam_size}")
        if self.choice == "nearest" and self.n_best > 1:
            raise UserError("--choice=nearest takes one hypothesis; leave --n_best out")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The export that translates; `kernels` as in `Translator.load`."""

    folder: Path
    kernels: str = "auto"

    def load(self) -> Translator:
        return Translator.load(self.folder, kernels=self.kernels, release_memory=malloc.trim)


class Distilled(NamedTuple):
    """What a corpus has of training text."""

    pairs: int
    translated: int  # of them, a teacher's


def distill(
    run: Run,
    splits: dict[str, Split],
    teacher: Teacher,
    how: Distillation,
    folder: Path,
) -> Distilled:
    """Writes the corpus of a run with its training text translated by an export; resumable.

    The run's workers translate parts of it. Validation and test text stay as they are. A training
    pair that is not UTF-8 or empty on a side has no translation.
    `UserError` if the folder has another corpus, or one of other settings.
    """
    languages = run.config.data.source_lang, run.config.data.target_lang
    _check_folder(folder)
    origin = read_manifest(teacher.folder)["weights_from"]
    named = {"teacher": run.stored(teacher.folder), "weights": origin}
    about = {**named, "data": run.config.data, **dataclasses.asdict(how)}
    parts, done = folder / _PARTS, folder / _COUNTS
    workdir.claim(folder, KIND, about, begun=parts.exists() or done.exists())
    if not done.exists():
        parts.mkdir(exist_ok=True)
        _translate(run, splits["train"], teacher, how, parts)
        # Training text last: a folder with it alone would be a corpus.
        for name, split in sorted(splits.items(), key=lambda own: own[0] == "train"):
            pairs = _all_pairs(split)
            if name == "train":
                pairs = itertools.chain(pairs if how.original else (), _translated(parts))
            _write(folder, name, languages, pairs)
        n_translated = sum(1 for _ in _translated(parts))
        n_original = len(splits["train"]) if how.original else 0
        counts = Distilled(n_original + n_translated, n_translated)
        files.write_json(done, {"version": 1, **counts._asdict()})
    shutil.rmtree(parts, ignore_errors=True)
    stored = files.read_json(done, "distilled corpus")
    return Distilled(stored["pairs"], stored["translated"])


def _check_folder(folder: Path):
    if folder.is_dir() and any(folder.iterdir()) and not (folder / workdir.MANIFEST).exists():
        raise UserError(f"{folder} holds something else; name a new or empty folder with --out")


def _translate(run: Run, split: Split, teacher: Teacher, how: Distillation, parts: Path):
    """Writes the parts that are missing: pairs of source and translation."""
    paths = {first: parts / f"{first:09d}.json" for first in range(0, len(split), CHUNK)}
    missing = [first for first, path in paths.items() if not path.exists()]
    if not missing:
        return
    task = run.progress.task("translating", len(split))
    done = sum(_size(split, first) for first in paths.keys() - set(missing))
    task.update(done)
    if run.workers.remote:
        work = functools.partial(_load_and_translate, teacher, how)
    else:
        work = functools.partial(
            _translated_part, teacher.load(), how, progress=lambda n, _: task.update(done + n)
        )
    texts = (_usable(split, first) for first in missing)
    for i, pairs in run.workers.each(work, texts):
        files.write_json(paths[missing[i]], {"version": 1, "pairs": pairs})
        done += _size(split, missing[i])
        task.update(done)
    task.close()


def _size(split: Split, first: int) -> int:
    """Pairs of the part that begins with pair `first`."""
    return min(CHUNK, len(split) - first)


def _usable(split: Split, first: int) -> list[tuple[str, str]]:
    """The pairs of a part that are text."""
    pairs = split.read(range(first, first + _size(split, first)))
    texts = [tuple(map(text_or_none, pair)) for pair in pairs]
    return [(s, t) for s, t in texts if s and t]


@functools.lru_cache(maxsize=1)
def _loaded(teacher: Teacher) -> Translator:
    return teacher.load()


def _load_and_translate(
    teacher: Teacher, how: Distillation, pairs: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """As `_translated_part`, in a process that may translate several parts."""
    return _translated_part(_loaded(teacher), how, pairs)


def _translated_part(
    translator: Translator,
    how: Distillation,
    pairs: list[tuple[str, str]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[str, str]]:
    """Pairs of source and translation, of pairs of source and reference."""
    n_hypotheses = how.beam_size if how.choice == "nearest" else how.n_best
    search = how.beam_size, how.length_penalty, n_hypotheses
    found = translator.translate([s for s, _ in pairs], *search, progress=progress)
    lowercase = translator.tokenizer is not None and translator.tokenizer.lowercase
    return [
        (source, hypothesis)
        for (source, reference), translation in zip(pairs, found, strict=True)
        for hypothesis in _chosen(translation, reference, how, lowercase=lowercase)
    ]


def _chosen(
    translation: Translation, reference: str, how: Distillation, *, lowercase: bool
) -> Sequence[str]:
    """The hypotheses of a sentence that become pairs; none that is empty."""
    texts = [own.text for own in translation.hypotheses]
    if how.choice == "nearest":
        # Imported here: the scores are wanted by no other phase that loads this module.
        from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415

        bleu = BLEU(effective_order=True, lowercase=lowercase)
        texts = [max(texts, key=lambda text: bleu.sentence_score(text, [reference]).score)]
    return [text for text in dict.fromkeys(texts[: how.n_best]) if text.strip()]


def _translated(parts: Path) -> Iterator[LinePair]:
    """The pairs of all parts, in the order of the text."""
    for path in sorted(parts.glob("[0-9]*.json")):  # a kill may leave part of another file
        for source, translation in files.read_json(path, "translations")["pairs"]:
            yield source.encode(), translation.encode()


def _all_pairs(split: Split) -> Iterator[LinePair]:
    for first in range(0, len(split), CHUNK):
        yield from split.read(range(first, min(first + CHUNK, len(split))))


def _write(folder: Path, name: str, languages: tuple[str, str], pairs: Iterable[LinePair]):
    """Writes a split, whole or not at all; a line feed inside a text becomes a blank."""
    paths = [folder / f"{name}.{language}" for language in languages]
    temporary = [path.with_name(f".{path.name}.tmp") for path in paths]
    with temporary[0].open("wb") as source, temporary[1].open("wb") as target:
        for pair in pairs:
            for file, text in zip((source, target), pair, strict=True):
                file.write(text.replace(b"\n", b" ") + b"\n")
    for path, own in zip(paths, temporary, strict=True):
        own.replace(path)
