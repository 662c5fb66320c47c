"""What a search minimises: validation loss, or 100 less the BLEU or chrF of translations."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokens import TokenPairs
from automoe_jax.decoding import evaluation as evaluate
from automoe_jax.decoding.translator import Translator
from automoe_jax.training.population import PopulationScorer, sample_pairs

# Fixes the pairs that the crowd is scored on.
SAMPLE_SEED = 0


class Objective(Protocol):
    """Scores of subnets, smaller is better."""

    label: str  # what it is, for the axis of a picture
    at_once: int  # subnets that are scored together

    def crowd(self, subnets: Sequence[Subnet]) -> list[float]:
        """On the sample."""
        ...

    def full(self, subnet: Subnet) -> float:
        """On the whole validation set."""
        ...


class Loss:
    """Nats per target token with inherited weights."""

    def __init__(self, scorer: PopulationScorer, pairs: TokenPairs, count: int):
        self.label = "validation loss, inherited weights (nats a token)"
        self.at_once = scorer.at_once
        self._scorer = scorer
        sample = sample_pairs(pairs, count, SAMPLE_SEED)
        self._sample = scorer.prepare(sample)
        self._all = self._sample if len(sample) == len(pairs) else scorer.prepare(pairs)

    def crowd(self, subnets: Sequence[Subnet]) -> list[float]:
        return self._scorer.losses(self._sample, subnets)

    def full(self, subnet: Subnet) -> float:
        return self._scorer.losses(self._all, [subnet])[0]


class Text:
    """100 less the BLEU or chrF of the exported subnet's translations."""

    at_once = 1

    def __init__(
        self,
        metric: str,
        export: Callable[[Subnet, Path], None],
        folder: Path,
        sources: Sequence[str],
        references: Sequence[str],
        count: int,
        beam_size: int,
    ):
        """Keeps what it is given.

        Args:
          metric: "bleu" or "chrf".
          export: writes an export with a tokenizer.
          folder: for exports that are scored and removed.
          sources, references: the validation set.
          count: sentences of the sample, spread evenly over it.
          beam_size: one of the exports'.
        """
        self.label = f"100 - validation {'BLEU' if metric == 'bleu' else 'chrF'}, inherited weights"
        self._metric, self._export, self._folder = metric, export, folder
        self._all = (list(sources), list(references))
        step = max(1, len(sources) // count)
        self._sample = tuple(x[::step][:count] for x in self._all)
        self._beam = beam_size

    def crowd(self, subnets: Sequence[Subnet]) -> list[float]:
        return [self._score(s, *self._sample) for s in subnets]

    def full(self, subnet: Subnet) -> float:
        return self._score(subnet, *self._all)

    def _score(self, subnet: Subnet, sources: list[str], references: list[str]) -> float:
        self._export(subnet, self._folder)
        scores, _ = evaluate.evaluate(
            Translator.load(self._folder), sources, references, self._beam
        )
        shutil.rmtree(self._folder)
        return 100 - getattr(scores, self._metric)
