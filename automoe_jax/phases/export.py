"""What an export that is not exact (int8, a shortlist) costs in quality, measured and written
into it.
"""

import dataclasses
import shutil
from pathlib import Path

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.config import RunConfig
from automoe_jax.decoding import evaluation as evaluate
from automoe_jax.decoding.translator import Translator
from automoe_jax.model.extract import Params
from automoe_jax.phases import prepare
from automoe_jax.phases import run as phases
from automoe_jax.system import files, workdir
from automoe_jax.system.progress import Progress

# Validation sentences that both are scored on.
SENTENCES = 1000
SCORES = "approximation"
EXACT = "exact"


def measure(
    config: RunConfig, run: Path, params: Params, subnet: Subnet, folder: Path, progress: Progress
) -> float:
    """BLEU of an export minus that of the same weights exported exactly, on validation text.

    Both scores are written into the export's manifest, under `scores`.

    Args:
      config: of the run.
      run: its workdir, with the corpus.
      params: of the export.
      subnet: its architecture.
      folder: the export.
      progress: shows how far translating is.
    """
    valid = prepare.corpus_split(config.data, run, "valid")
    sources, references = evaluate.read_split(valid, SENTENCES)
    beam = Translator.load(folder).beam_size()
    programs = dataclasses.replace(config.export, beam_sizes=(beam,), quantize="none", shortlist=0)
    plain = folder.with_name(f".{folder.name}.{EXACT}")
    exact = dataclasses.replace(config, export=programs)
    phases.export_params(exact, run, params, subnet, plain, "for comparison")
    try:
        bleu = {}
        for name, path in ((EXACT, plain), ("export", folder)):
            task = progress.task(f"translating ({name})", len(sources))
            scores, _ = evaluate.evaluate(
                Translator.load(path),
                sources,
                references,
                beam,
                progress=lambda done, total, task=task: task.update(done),
            )
            task.close()
            bleu[name] = scores.bleu
    finally:
        shutil.rmtree(plain, ignore_errors=True)
    difference = bleu["export"] - bleu[EXACT]
    manifest = files.read_json(folder / workdir.MANIFEST, "export manifest")
    manifest["scores"][SCORES] = {
        "bleu": bleu,
        "difference": difference,
        "split": "valid",
        "sentences": len(sources),
        "beam_size": beam,
    }
    files.write_json(folder / workdir.MANIFEST, manifest)
    return difference
