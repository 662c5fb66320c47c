"""Translation quality: sacreBLEU and chrF with signatures, and the BLEU of HAT and AutoMoE."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from automoe_jax.data.corpus import Split
from automoe_jax.data.tokenizers.token_ids import TokenIds
from automoe_jax.data.tokens import text_or_none
from automoe_jax.decoding.translator import Translation, Translator
from automoe_jax.system.errors import UserError

_ENDS = 0.025, 0.975  # of a 95 % interval
_COMPOUND = re.compile(r"(\S)-(\S)")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Corpus scores, 0 to 100, of detokenised text; and the BLEU that HAT and AutoMoE publish."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    sentences: int
    tokenized_bleu: float | None = None
    tokenized_bleu_signature: str | None = None


def score(
    hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False
) -> Scores:
    """Scores of translations against one reference each; `UserError` where counts differ.

    `lowercase` leaves case out of account.
    """
    if len(hypotheses) != len(references):
        counts = f"{len(hypotheses)} translations but {len(references)} references"
        raise UserError(f"{counts}; the same number is needed")
    if not hypotheses:
        raise UserError("there is nothing to score")
    bleu, chrf = BLEU(lowercase=lowercase), CHRF(lowercase=lowercase)
    return Scores(
        bleu=bleu.corpus_score(hypotheses, [references]).score,
        chrf=chrf.corpus_score(hypotheses, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
        sentences=len(hypotheses),
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much more BLEU one system has than another, and the 95 % interval."""

    bleu: float
    low: float
    high: float


def paired_difference(
    hypotheses: Sequence[str],
    others: Sequence[str],
    references: Sequence[str],
    *,
    samples: int = 1000,
    seed: int = 0,
    lowercase: bool = False,
) -> Difference:
    """BLEU of `hypotheses` less that of `others`, with a paired bootstrap over sentences.

    Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation": each sample
    draws as many sentences, the same for both systems.
    """
    sides = (_counts(x, references, lowercase=lowercase) for x in (hypotheses, others))
    counts_SC, others_SC = sides
    found = [
        _bleu(counts_SC[drawn]) - _bleu(others_SC[drawn])
        for drawn in _draws(len(references), samples, seed)
    ]
    low, high = np.quantile(found, _ENDS)
    return Difference(_bleu(counts_SC) - _bleu(others_SC), float(low), float(high))


def bleu_interval(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    samples: int = 1000,
    seed: int = 0,
    lowercase: bool = False,
) -> tuple[float, float]:
    """The 95 % interval of the BLEU of `score`, by a bootstrap over sentences."""
    counts_SC = _counts(hypotheses, references, lowercase=lowercase)
    found = [_bleu(counts_SC[drawn]) for drawn in _draws(len(references), samples, seed)]
    low, high = np.quantile(found, _ENDS)
    return float(low), float(high)


def _draws(n: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Sentences of the samples of a bootstrap."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, n, n) for _ in range(samples))


def _counts(hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool) -> np.ndarray:
    """What BLEU is made of (S, C), sentence by sentence: n-grams that match, all, both lengths."""
    metric = BLEU(lowercase=lowercase)
    pairs = zip(hypotheses, references, strict=True)
    scores = [metric.corpus_score([h], [[r]]) for h, r in pairs]
    return np.array([[*x.counts, *x.totals, x.sys_len, x.ref_len] for x in scores])


def _bleu(counts_SC: np.ndarray) -> float:
    """Corpus BLEU of some sentences' counts, smoothed as `score` does."""
    *ngrams, length, reference_length = map(int, counts_SC.sum(axis=0))
    matches, totals = ngrams[: len(ngrams) // 2], ngrams[len(ngrams) // 2 :]
    return BLEU.compute_bleu(matches, totals, length, reference_length, "exp").score


def most_repeats(text: str) -> int:
    """How often a word, or a sign, stands in a row: a sign of a model that was lost."""
    runs = [
        len(list(run)) for parts in (text.split(), text) for part, run in itertools.groupby(parts)
        if part != " "
    ]  # fmt: skip
    return max(runs, default=0)


def split_compounds(text: str) -> str:
    """Splits compounds at hyphens, by the regular expression of HAT's and AutoMoE's test.sh.

    Of two hyphens around one letter it splits only the first.
    """
    return _COMPOUND.sub(r"\1 ##AT##-##AT## \2", text)


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU of fairseq's score.py (HAT's and AutoMoE's "normal" metric), and its signature.

    Tokens are separated by blanks, compounds are split, and nothing is smoothed.
    """
    bleu = BLEU(tokenize="none", smooth_method="none", force=True)
    sides = [[split_compounds(text) for text in texts] for texts in (hypotheses, references)]
    score = bleu.corpus_score(sides[0], [sides[1]]).score
    return score, f"{bleu.get_signature()}|compounds:split"


def _tokens(
    translator: Translator, translations: Sequence[Translation], references: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Tokens of translations and references: a bpe model's own, for other models Moses's."""
    tokenizer, languages = translator.tokenizer, translator.manifest["languages"]
    texts = [t.text for t in translations]
    if isinstance(tokenizer, TokenIds):
        return texts, list(references)
    # Imported here: sacremoses takes 0.2 s, and every phase imports this module.
    if tokenizer is not None and tokenizer.kind == "bpe":
        from automoe_jax.data.tokenizers.fairseq_bpe import FairseqBpe  # noqa: PLC0415

        assert isinstance(tokenizer, FairseqBpe)
        found = tokenizer.tokenized([t.hypotheses[0].ids for t in translations])
        # As fairseq prints references: by the dictionary, with unknown words marked.
        return found, tokenizer.tokenized(tokenizer.encode(references, "target"), "<<unk>>")
    from sacremoses import MosesTokenizer  # noqa: PLC0415

    moses = MosesTokenizer(languages[1] if languages else "en")
    found, wanted = ([" ".join(moses.tokenize(t)) for t in ts] for ts in (texts, references))
    return found, wanted


def read_split(split: Split, limit: int = 0) -> tuple[list[str], list[str]]:
    """Sources and references of the first `limit` pairs (0: all), without those not in UTF-8."""
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
    *,
    lowercase: bool = False,
) -> tuple[Scores, list[str]]:
    """Translates and scores; also returns the translations.

    `lowercase` as in `score`; true in any case for a tokenizer that lower-cases.
    """
    lowercase |= translator.tokenizer is not None and translator.tokenizer.lowercase
    if isinstance(translator.tokenizer, TokenIds):  # translations have no eos: references neither
        ids = translator.tokenizer.encode(references, "target")
        references = translator.tokenizer.decode(ids)
    translations = translator.translate(sources, beam_size, length_penalty, progress=progress)
    texts = [t.text for t in translations]
    scores = score(texts, references, lowercase=lowercase)
    sides = _tokens(translator, translations, references)
    if lowercase:
        sides = [[text.lower() for text in side] for side in sides]
    bleu, signature = tokenized_bleu(*sides)
    if lowercase:
        signature = signature.replace("case:mixed", "case:lc")
    scores = dataclasses.replace(scores, tokenized_bleu=bleu, tokenized_bleu_signature=signature)
    return scores, texts
