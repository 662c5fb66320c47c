"""What a search minimises: validation loss, or 100 minus BLEU or chrF of translations."""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokens import TokenPairs
from automoe_jax.decoding import evaluation
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.translator import Translator
from automoe_jax.phases import trained_subnets
from automoe_jax.phases.export import SupernetExporter
from automoe_jax.phases.prepare import corpus_split
from automoe_jax.phases.run import Run
from automoe_jax.search.calibration import Calibration
from automoe_jax.training.population import PopulationScorer, sample_pairs

# Seed of the validation pairs that candidates are compared on.
SAMPLE_SEED = 0


class Objective(Protocol):
    """Scores of subnets with inherited weights; lower is better."""

    @property
    def label(self) -> str:
        """What the score is, for the axis of a picture."""
        ...

    @property
    def batch_size(self) -> int:
        """Subnets that are scored together."""
        ...

    def sample(self, subnets: Sequence[Subnet]) -> list[float]:
        """Scores on a sample of the validation set."""
        ...

    def full(self, subnet: Subnet) -> float:
        """The score on the whole validation set."""
        ...


@dataclasses.dataclass(frozen=True)
class Loss:
    """Nats per target token."""

    scorer: PopulationScorer
    sample_batches: list[Any]
    all_batches: list[Any]
    label: str = "validation loss, inherited weights (nats a token)"

    @property
    def batch_size(self) -> int:
        return self.scorer.at_once

    def sample(self, subnets: Sequence[Subnet]) -> list[float]:
        return self.scorer.losses(self.sample_batches, subnets)

    def full(self, subnet: Subnet) -> float:
        return self.scorer.losses(self.all_batches, [subnet])[0]


@dataclasses.dataclass(frozen=True)
class CalibratedLoss:
    """Validation loss with inherited weights, corrected by `calibration`; nats per token."""

    inherited: Loss
    calibration: Calibration
    label: str = "validation loss, inherited weights, corrected (nats a token)"

    @property
    def batch_size(self) -> int:
        return self.inherited.batch_size

    def sample(self, subnets: Sequence[Subnet]) -> list[float]:
        return self.calibration.correct(subnets, self.inherited.sample(subnets))

    def full(self, subnet: Subnet) -> float:
        return self.calibration.correct([subnet], [self.inherited.full(subnet)])[0]


@dataclasses.dataclass(frozen=True)
class TranslationQuality:
    """100 minus the BLEU or chrF of the exported subnet's translations."""

    metric: str  # "bleu" or "chrf"
    exporter: SupernetExporter
    folder: Path  # for exports, each removed after scoring
    sources: Sequence[str]  # the validation set
    references: Sequence[str]
    count: int  # sentences of the sample, spread evenly over the validation set
    beam_size: int
    batch_size: int = 1

    @property
    def label(self) -> str:
        name = "BLEU" if self.metric == "bleu" else "chrF"
        return f"100 - validation {name}, inherited weights"

    def sample(self, subnets: Sequence[Subnet]) -> list[float]:
        step = max(1, len(self.sources) // self.count)
        sample = [texts[::step][: self.count] for texts in (self.sources, self.references)]
        return [self._score(subnet, *sample) for subnet in subnets]

    def full(self, subnet: Subnet) -> float:
        return self._score(subnet, self.sources, self.references)

    def _score(self, subnet: Subnet, sources: Sequence[str], references: Sequence[str]) -> float:
        self.exporter.export(subnet, self.folder, (self.beam_size,))
        scores = scored(self.folder, sources, references, self.beam_size)
        return 100 - getattr(scores, self.metric)


def scored(
    export: Path, sources: Sequence[str], references: Sequence[str], beam_size: int
) -> evaluation.Scores:
    """The scores of an export's translations; removes the export."""
    scores, _ = evaluation.evaluate(Translator.load(export), sources, references, beam_size)
    shutil.rmtree(export)
    return scores


def objective_beam(export: ExportConfig) -> int:
    """The beam of the translations that candidates are scored by: the smallest."""
    return min(export.beam_sizes)


def make_objective(
    run: Run, folder: Path, scorer: PopulationScorer, exporter: SupernetExporter, pairs: TokenPairs
) -> Objective:
    """The configured objective; `pairs` are the validation set, `folder` is the search's."""
    search = run.config.search
    if search.objective == "loss":
        sample = sample_pairs(pairs, search.eval_pairs, SAMPLE_SEED)
        batches = scorer.prepare(sample)
        whole = batches if len(sample) == len(pairs) else scorer.prepare(pairs)
        loss = Loss(scorer, batches, whole)
        return _calibrated(run, folder, loss) if search.calibration else loss
    sources, references = evaluation.read_split(corpus_split(run, "valid"))
    beam, hidden = objective_beam(run.config.export), folder / ".objective"
    count = search.objective_sentences
    return TranslationQuality(search.objective, exporter, hidden, sources, references, count, beam)


def _calibrated(run: Run, folder: Path, loss: Loss) -> CalibratedLoss:
    """The loss, corrected by the trained subnets that the config names."""
    own = trained_subnets.read(run.config.search.calibration, run.config)
    count = len(own.subnets)
    run.progress.note(f"inherited losses are corrected by those of {count} trained subnets")
    inherited = functools.partial(loss.scorer.losses, loss.all_batches)
    return CalibratedLoss(loss, own.calibration(inherited, folder))
