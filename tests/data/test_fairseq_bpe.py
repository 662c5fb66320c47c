"""The text of published models: Moses, BPE, dict.txt; ids as text; their BLEU."""

import collections
import math

import pytest
from bpe_files import ENGLISH, GERMAN, bpe_files
from sacremoses import MosesTokenizer

from automoe_jax.data.tokenizers import fairseq_bpe, token_ids
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.decoding import evaluation as evaluate
from automoe_jax.decoding.translator import Hypothesis, Translation
from automoe_jax.system.errors import UserError


@pytest.fixture(
    params=[(False, False), (True, False), (False, True)], ids=["cased", "lowercase", "dashes"]
)
def made(tmp_path, request):
    lowercase, dashes = request.param
    codes, english, german = bpe_files(tmp_path, lowercase, dashes)
    fairseq_bpe.make([english, german], codes, ("en", "de"), tmp_path / "t", lowercase=lowercase)
    tokenizer = tokenizers.load(tmp_path / "t")
    assert tokenizer.splits_dashes == dashes
    return tmp_path, lowercase, tokenizer


def test_ids_are_lines_of_the_dictionary(made):
    folder, _, tokenizer = made
    sides = ("source", "target")
    for side, language, sentences in zip(sides, ("en", "de"), (ENGLISH, GERMAN), strict=True):
        lines = (folder / f"dict.{language}.txt").read_text(encoding="utf-8").split("\n")
        symbols = [line.split(" ")[0] for line in lines if line]
        pieces = (folder / f"bpe.{language}").read_text(encoding="utf-8").splitlines()
        expected = [[4 + symbols.index(piece) for piece in line.split()] + [2] for line in pieces]
        assert tokenizer.encode(sentences, side) == expected
    assert tokenizer.vocab_sizes == tuple(
        4 + len((folder / f"dict.{x}.txt").read_text(encoding="utf-8").splitlines())
        for x in ("en", "de")
    )


def test_text_comes_back(made):
    _, lowercase, tokenizer = made
    ids = tokenizer.encode(GERMAN, "target")
    expected = [s.lower() if lowercase else s for s in GERMAN]
    assert tokenizer.decode([[0, *x, 1, 1] for x in ids])[0] == expected[0]
    assert tokenizer.tokenized(ids)[1].split()[:3] == expected[1].split()[:3]
    (unknown,) = tokenizer.encode(["ж"], "target")
    assert unknown == [3, 2]
    assert tokenizer.tokenized([unknown], "<<unk>>") == ["<<unk>>"]
    assert tokenizer.decode([unknown]) == ["<unk>"]
    assert tokenizer.encode([""], "target") == [[2]]


def test_pieces_make_the_words(made):
    """Each side's tokens are those of its sentence, eos and unknown words apart."""
    _, lowercase, tokenizer = made
    for side, sentences in (("source", ENGLISH), ("target", GERMAN)):
        ids = tokenizer.encode(sentences, side)
        for own, sentence in zip(ids, sentences, strict=True):
            pieces = tokenizer.pieces(own, side)
            assert len(pieces) == len(own)
            assert pieces[-1] == ""
            language = {"source": "en", "target": "de"}[side]
            dashes = tokenizer.splits_dashes
            words = MosesTokenizer(language).tokenize(sentence, aggressive_dash_splits=dashes)
            expected = " ".join(words).lower() if lowercase else " ".join(words)
            assert "".join(pieces) == f" {expected}"


def test_the_last_of_equal_symbols_counts(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("a 3\nb 2\na 1\n")
    dictionary = fairseq_bpe.Dictionary.load(path)
    assert len(dictionary) == 7
    assert dictionary.encode(["a", "b", "c"]) == [6, 5, 3, 2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dict.en.txt", "a 1\nb\n", "line 2 is 'b'; fairseq's dict.txt has a symbol"),
        ("dict.en.txt", "", "is empty"),
        ("codes", "#version: 0.2\na b\nthree are many\n", "invalid line 3 in BPE codes file"),
        ("codes", "", "is empty; give the merges"),
        ("codes", "a 3\nb 2\n", "has a count on each line, as a dictionary has"),
        ("codes", "#version: new\na b\n", "not a file of subword-nmt's learn_bpe"),
    ],
)
def test_wrong_files(tmp_path, name, content, words):
    codes, english, german = bpe_files(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as e:
        fairseq_bpe.make([english, german], codes, ("en", "de"), tmp_path / "t", lowercase=False)
    assert words in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "words"}, "tokenizer.kind is 'words'; allowed: sentencepiece, bpe, ids"),
        ({"kind": "bpe", "bpe_codes": "c"}, "tokenizer.dictionaries has 0 files"),
        ({"kind": "bpe", "dictionaries": ("d",)}, "tokenizer.bpe_codes is empty"),
        ({"bpe_codes": "c"}, "are for kind bpe, but tokenizer.kind is sentencepiece"),
        ({"kind": "ids", "lowercase": True}, "but tokenizer.kind is ids: ids have no case"),
    ],
)
def test_wrong_config(fields, words):
    with pytest.raises(UserError) as e:
        TokenizerConfig(**fields)
    assert words in str(e.value)


def test_ids_as_text(tmp_path):
    token_ids.make((10, 12), tmp_path / "t")
    tokenizer = tokenizers.load(tmp_path / "t")
    assert tokenizer.vocab_sizes == (10, 12)
    assert tokenizer.encode(["4 9", "5 2", ""]) == [[4, 9, 2], [5, 2], [2]]
    assert tokenizer.encode(["11"], "target") == [[11, 2]]
    assert tokenizer.decode([[4, 11, 2, 1]]) == ["4 11"]
    assert tokenizer.pieces([4, 11, 2, 1], "target") == [" 4", " 11", "", ""]
    for text in ("4 x", "10", "-4", "1", "٣", "4" * 5000):
        with pytest.raises(UserError, match=r"is not a token id; .* 0 to 9 except the pad 1"):
            tokenizer.encode([text])


def test_a_mark_at_the_start_is_no_symbol(tmp_path):
    codes, english, german = bpe_files(tmp_path)
    fairseq_bpe.make([english, german], codes, ("en", "de"), tmp_path / "a", lowercase=False)
    for path in (codes, english, german):
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    fairseq_bpe.make([english, german], codes, ("en", "de"), tmp_path / "b", lowercase=False)
    a, b = (tokenizers.load(tmp_path / x).encode(ENGLISH) for x in "ab")
    assert a == b


# --- their BLEU ----------------------------------------------------------------------------------


def bleu_by_hand(hypotheses, references) -> float:
    """BLEU-4 of blank-separated tokens, straight from Papineni et al. (2002)."""
    matches, totals = [0] * 4, [0] * 4
    lengths = [0, 0]
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        h, r = hypothesis.split(), reference.split()
        lengths[0] += len(h)
        lengths[1] += len(r)
        for n in range(4):
            grams = [
                collections.Counter(tuple(x[i : i + n + 1]) for i in range(len(x) - n))
                for x in (h, r)
            ]
            matches[n] += sum((grams[0] & grams[1]).values())
            totals[n] += sum(grams[0].values())
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)
    return 100 * precision * min(1, math.exp(1 - lengths[1] / lengths[0]))


def test_tokenized_bleu():
    hypotheses = ["the well-known man does not say yes .", "it is 3-4 m wide and x-y-z long"]
    references = ["the well-known man doesn &apos;t say yes .", "it is 3-4 m wide , x-y-z long"]
    split = evaluate.split_compounds
    assert split(hypotheses[1]) == "it is 3 ##AT##-##AT## 4 m wide and x ##AT##-##AT## y-z long"
    assert split("- a -b c-") == "- a -b c-"
    score, signature = evaluate.tokenized_bleu(hypotheses, references)
    expected = bleu_by_hand(*([split(x) for x in texts] for texts in (hypotheses, references)))
    assert score == pytest.approx(expected, abs=1e-6)
    assert score != pytest.approx(bleu_by_hand(hypotheses, references), abs=0.1)
    assert "tok:none|smooth:none" in signature


class Scored:
    """An export that gives fixed translations."""

    def __init__(self, tokenizer, hypotheses):
        self.tokenizer, self.manifest = tokenizer, {"languages": ["en", "de"]}
        self._hypotheses = hypotheses

    def translate(self, *args, **kwargs):
        return [Translation((Hypothesis(text, 0.0, tuple(x)),)) for text, x in self._hypotheses]


def test_the_difference_of_two_systems():
    """Its value is that of corpus scores; the interval is a bootstrap's over sentences."""
    references = [f"the {word} sat on the mat and slept" for word in ("cat", "dog", "cow", "hen")]
    references *= 10
    worse = [text.replace("mat and", "and") for text in references]
    found = evaluate.paired_difference(references, worse, references)
    scores = (evaluate.score(x, references).bleu for x in (references, worse))
    assert found.bleu == pytest.approx(next(scores) - next(scores))
    # All sentences lose as much: there is nothing to doubt.
    assert found.low == pytest.approx(found.bleu)
    assert found.high == pytest.approx(found.bleu)
    other = evaluate.paired_difference(worse, references, references)
    assert other.bleu == pytest.approx(-found.bleu)
    mixed = [b if i % 2 else a for i, (a, b) in enumerate(zip(references, worse, strict=True))]
    found = evaluate.paired_difference(mixed, worse, references)
    assert 0 < found.low < found.bleu < found.high
    same = evaluate.paired_difference(mixed, mixed, references)
    assert (same.bleu, same.low, same.high) == (0, 0, 0)
    shout = [text.upper() for text in references]
    found = evaluate.paired_difference(shout, references, references, lowercase=True)
    assert found.bleu == pytest.approx(0)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("", 0), ("a b", 1), ("der der der Hund", 3), ("im Jahr 200000 und 11", 5),
        ("a   b    c", 1), ("Schifffahrt", 3),
    ],
)  # fmt: skip
def test_repeats_in_a_row(text, times):
    assert evaluate.most_repeats(text) == times


def test_scores_without_regard_to_case():
    """Of a translator without a tokenizer of its own: words by Moses's rules."""
    translator = Scored(None, [(text.lower(), (4, 2)) for text in GERMAN])
    cased, _ = evaluate.evaluate(translator, ENGLISH, GERMAN)
    found, _ = evaluate.evaluate(translator, ENGLISH, GERMAN, lowercase=True)
    assert found.bleu == pytest.approx(100)
    assert found.tokenized_bleu == pytest.approx(100)
    assert found.chrf == pytest.approx(100)
    assert cased.bleu < 99
    assert (cased.tokenized_bleu or 0) < 99
    assert "case:lc" in found.bleu_signature
    assert "case:lc" in (found.tokenized_bleu_signature or "")


def test_what_is_scored(tmp_path):
    """A model's own tokens, merged; unknown words match nothing; Moses's otherwise."""
    codes, english, german = bpe_files(tmp_path)
    fairseq_bpe.make([english, german], codes, ("en", "de"), tmp_path / "t", lowercase=False)
    bpe = tokenizers.load(tmp_path / "t")
    ids = bpe.encode(GERMAN, "target")
    translator = Scored(bpe, [(text, x[:-1]) for text, x in zip(GERMAN, ids, strict=True)])
    scores, _ = evaluate.evaluate(translator, ENGLISH, GERMAN)
    assert scores.tokenized_bleu == pytest.approx(100)
    # An unknown word on both sides is a match as text, but not as tokens.
    strange = [GERMAN[0], GERMAN[1].replace("Türme", "ж")]
    ids = bpe.encode(strange, "target")
    translator = Scored(bpe, [(text, x[:-1]) for text, x in zip(strange, ids, strict=True)])
    scores, _ = evaluate.evaluate(translator, ENGLISH, strange)
    moses = MosesTokenizer("de")
    hypotheses = [moses.tokenize(s, return_str=True).replace("ж", "<unk>") for s in strange]
    references = [h.replace("<unk>", "<<unk>>") for h in hypotheses]
    assert scores.tokenized_bleu == pytest.approx(
        evaluate.tokenized_bleu(hypotheses, references)[0]
    )
    assert scores.tokenized_bleu != pytest.approx(100)

    other = Scored(None, [(text, ()) for text in strange])
    scores, _ = evaluate.evaluate(other, ENGLISH, GERMAN)
    hypotheses, references = (
        [moses.tokenize(s, return_str=True) for s in texts] for texts in (strange, GERMAN)
    )
    assert scores.tokenized_bleu == pytest.approx(
        evaluate.tokenized_bleu(hypotheses, references)[0]
    )

    token_ids.make((10, 12), tmp_path / "ids")
    ids = Scored(tokenizers.load(tmp_path / "ids"), [("4 5 6 7 8", (4, 5, 6, 7, 8))])
    scores, _ = evaluate.evaluate(ids, ["4"], ["4 5 6  7 8 2"])  # a final eos is no word
    assert scores.tokenized_bleu == pytest.approx(100)
    assert scores.bleu == pytest.approx(100)
