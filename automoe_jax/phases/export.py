"""Exports trained, inherited or random weights; measures what quantisation costs in BLEU."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.config import RunConfig
from automoe_jax.data import lexicon, tokens
from automoe_jax.decoding import evaluation
from automoe_jax.decoding.export import export
from automoe_jax.decoding.translator import Translator
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.latency.kernels import kernels_used
from automoe_jax.model.extract import Params, inherited, with_scales
from automoe_jax.model.scales import scales_of
from automoe_jax.phases.prepare import corpus_split, vocab_sizes
from automoe_jax.phases.run import Run
from automoe_jax.phases.weights import random_weights
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError

N_SAMPLES = 32  # sentences kept in an export for benchmarks on real text
COMPARED = 1000  # validation sentences that an approximate and an exact export are scored on


def model_spec(config: RunConfig, subnet: Subnet) -> ModelSpec:
    """A subnet with the base widths and the gate of its space."""
    hull = config.space.hull()
    return ModelSpec(subnet, hull.encoder.embed_dim, hull.decoder.embed_dim, config.space.gate)


def export_params(
    run: Run, params: Params, subnet: Subnet, folder: Path, origin: str, *, programs: bool = True
):
    """Exports stand-alone weights with the run's tokenizer and some of its sentences.

    `origin` describes where the weights come from; `programs` as in `export`. An export in
    `folder` is replaced.
    """
    config = run.config
    samples: list[str] = []
    if run.tokens.is_dir():  # a converted run may have no corpus
        samples, _ = evaluation.read_split(corpus_split(run, "valid"), N_SAMPLES)
    translations = None
    if config.export.shortlist:
        if not (run.tokens / "train").is_dir():
            raise UserError(
                f"{run.path} has no training text to count a shortlist from; leave it out"
            )
        pairs = tokens.load(run.tokens / "train")
        translations = lexicon.build(pairs, *vocab_sizes(run), config.export.shortlist)
    spec, languages = model_spec(config, subnet), (config.data.source_lang, config.data.target_lang)
    made_by = config.groups(*(field.name for field in dataclasses.fields(config)))
    params = with_scales(params, scales_of(config.space))
    export(
        params, spec, config.export, folder, origin, run.tokenizer, languages, samples, made_by,
        lexicon=translations, programs=programs,
    )  # fmt: skip


def export_random(config: RunConfig, subnet: Subnet, folder: Path, vocab_sizes: tuple[int, int]):
    """Exports an architecture with random weights and no tokenizer, for timing."""
    params = random_weights(config, vocab_sizes, subnet)
    export(params, model_spec(config, subnet), config.export, folder, "random")


def add_scores(folder: Path, scores: dict[str, Any]):
    """Adds scores to an export's manifest."""
    manifest = files.read_json(folder / workdir.MANIFEST, "export manifest")
    manifest["scores"].update(scores)
    files.write_json(folder / workdir.MANIFEST, manifest)


def measure_approximation(run: Run, params: Params, subnet: Subnet, folder: Path) -> float:
    """Validation BLEU of an approximate export (int8, shortlist) less that of an exact one.

    The export in `folder` has the stand-alone weights `params`; both scores go into its manifest.
    """
    sources, references = evaluation.read_split(corpus_split(run, "valid"), COMPARED)
    beam = Translator.load(folder).beam_size()
    exact = folder.with_name(f".{folder.name}.exact")
    plain = with_export(run, beam_sizes=(beam,), quantize="none", shortlist=0)
    export_params(plain, params, subnet, exact, "for comparison", programs=False)
    try:
        bleu = {}
        for name, path in (("exact", exact), ("export", folder)):
            task = run.progress.task(f"translating ({name})", len(sources))
            scores, _ = evaluation.evaluate(
                Translator.load(path), sources, references, beam,
                progress=lambda done, total, task=task: task.update(done),
            )  # fmt: skip
            task.close()
            bleu[name] = scores.bleu
    finally:
        shutil.rmtree(exact, ignore_errors=True)
    difference = bleu["export"] - bleu["exact"]
    about = {"split": "valid", "sentences": len(sources), "beam_size": beam}
    add_scores(folder, {"approximation": {"bleu": bleu, "difference": difference, **about}})
    return difference


def with_export(run: Run, **changes: Any) -> Run:
    """The run with other settings in group `export`."""
    settings = dataclasses.replace(run.config.export, **changes)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, export=settings))


@dataclasses.dataclass(frozen=True)
class SupernetExporter:
    """Exports subnets with inherited weights, for timing and comparison."""

    run: Run
    supernet: Params
    origin: str  # describes where the weights come from

    def params(self, subnet: Subnet) -> Params:
        """A subnet's weights, as NumPy."""
        own = inherited(self.supernet, subnet, self.run.config.space)
        return jax.tree.map(np.asarray, own)

    def export(self, subnet: Subnet, folder: Path, beam_sizes: Sequence[int] = ()):
        """An export for this process, without programs; `beam_sizes` replace the config's."""
        sizes = tuple(beam_sizes) or self.run.config.export.beam_sizes
        run = with_export(self.run, beam_sizes=sizes)
        export_params(run, self.params(subnet), subnet, folder, self.origin, programs=False)

    def export_for_timing(self, subnet: Subnet, folder: Path, beam_size: int):
        """Weights alone, without tokenizer and programs."""
        config = self.run.config
        params = with_scales(self.params(subnet), scales_of(config.space))
        _export_for_timing(config, params, subnet, folder, beam_size, self.origin)


@dataclasses.dataclass(frozen=True)
class RandomExporter:
    """Exports subnets with random weights, for timing before anything is trained."""

    config: RunConfig
    vocab_sizes: tuple[int, int]

    def export_for_timing(self, subnet: Subnet, folder: Path, beam_size: int):
        """As `SupernetExporter.export_for_timing`."""
        params = random_weights(self.config, self.vocab_sizes, subnet)
        _export_for_timing(self.config, params, subnet, folder, beam_size, "random")


def _export_for_timing(
    config: RunConfig, params: Params, subnet: Subnet, folder: Path, beam_size: int, origin: str
):
    settings = dataclasses.replace(config.export, beam_sizes=(beam_size,))
    kernels = (kernels_used(config.latency, subnet.cell),)
    export(
        params, model_spec(config, subnet), settings, folder, origin, kernels=kernels,
        programs=False,
    )  # fmt: skip
