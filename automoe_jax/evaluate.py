"""Translation quality: sacreBLEU and chrF, with their signatures."""

import dataclasses
from collections.abc import Callable, Sequence

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from automoe_jax.data.corpus import Split
from automoe_jax.data.tokens import text_or_none
from automoe_jax.decoding.translator import Translator
from automoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scores:
    """Corpus scores of detokenised text, 0 to 100."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    sentences: int


def score(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """Scores of translations against one reference each; `UserError` where counts differ."""
    if len(hypotheses) != len(references):
        raise UserError(
            f"{len(hypotheses)} translations but {len(references)} references; the same number "
            "is needed"
        )
    if not hypotheses:
        raise UserError("there is nothing to score")
    bleu, chrf = BLEU(), CHRF()
    return Scores(
        bleu=bleu.corpus_score(hypotheses, [references]).score,
        chrf=chrf.corpus_score(hypotheses, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
        sentences=len(hypotheses),
    )


def read_split(split: Split, limit: int = 0) -> tuple[list[str], list[str]]:
    """Sources and references of a split, pairs that are not UTF-8 left out.

    Args:
      split: of a corpus.
      limit: most pairs, from the front; 0 for all.
    """
    n = min(len(split), limit) if limit else len(split)
    texts = [tuple(map(text_or_none, pair)) for pair in split.read(range(n))]
    kept = [(s, t) for s, t in texts if s is not None and t is not None]
    return [s for s, _ in kept], [t for _, t in kept]


def evaluate(
    translator: Translator,
    sources: Sequence[str],
    references: Sequence[str],
    beam_size: int | None = None,
    length_penalty: float = 0.6,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Scores, list[str]]:
    """Translates and scores; returns the translations too."""
    translations = translator.translate(sources, beam_size, length_penalty, progress=progress)
    texts = [t.text for t in translations]
    return score(texts, references), texts
