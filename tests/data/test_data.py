"""Corpora, tokens, plans and batches."""

import dataclasses
import gzip
import itertools
import json
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import shipped_config

from automoe_jax.config import base, resolve
from automoe_jax.data import batches, phrases, tokens
from automoe_jax.data.config import DataConfig
from automoe_jax.data.corpus import open_corpus, taken_out
from automoe_jax.data.phrase_values import KINDS, SPLITS, belongs, draw
from automoe_jax.data.plan import JOIN_EVERY, Plan, choose_buckets
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.data.tokenizers.sentence_piece import train
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import Run
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent

# --- phrases -------------------------------------------------------------------------------------


def test_phrases_are_a_pure_function_of_split_and_index():
    assert list(phrases.pairs("train", 5)) == [phrases.pair(i, "train") for i in range(5)]
    assert phrases.pair(10**9, "test") == phrases.pair(10**9, "test")
    assert phrases.pair(0, "train", seed=1) != phrases.pair(0, "train", seed=0)
    many = list(phrases.pairs("train", 500))
    assert len(set(many)) > 480


def test_no_sentence_of_one_split_stands_in_another():
    text = {split: {e for e, _ in phrases.pairs(split, 4000)} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not text[a] & text[b]


@pytest.mark.parametrize("kind", [k for k, (_, held_out) in KINDS.items() if held_out])
def test_values_of_the_test_split_are_not_in_training(kind):
    values = {}
    for split in SPLITS:
        rng = np.random.default_rng(0)
        values[split] = {draw(kind, rng, split)[0] for _ in range(200)}
        assert all(belongs(v, split) for v in values[split])
    for a, b in itertools.combinations(SPLITS, 2):
        assert not values[a] & values[b]


def test_phrases_read_as_they_should():
    text = {pair for split in SPLITS for pair in phrases.pairs(split, 3000)}
    german = " ".join(g for _, g in text)
    for word in ("Montag", "Uhr", "dreiundzwanzig", "Kilometer", "Frankreich", "Polnisch", "vor "):
        assert word in german, word
    assert not [p for p in text if "{" in p[0] + p[1] or "\u00a0" in p[0] + p[1]]
    assert all(e[0] == e[0].upper() and g[0] == g[0].upper() for e, g in text)


def test_phrases_corpus(tmp_path):
    config = DataConfig("phrases", "de", "en", train_pairs=30, valid_pairs=4, test_pairs=5)
    corpus = open_corpus(config, tmp_path / "c")
    assert {k: len(v) for k, v in corpus.items()} == {"train": 30, "valid": 4, "test": 5}
    english, german = phrases.pair(3, "test")
    assert corpus["test"].read([3]) == [(german.encode(), english.encode())]
    with pytest.raises(UserError, match="not fr and en"):
        open_corpus(dataclasses.replace(config, source_lang="fr"), tmp_path / "d")


# --- parallel text -------------------------------------------------------------------------------


def write_corpus(folder, n=6, **sides):
    """train and valid in `xx` and `yy`; `sides` replaces the bytes of a file."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "valid"):
        for lang in ("xx", "yy"):
            lines = [f"{split} {lang} sentence {i}" for i in range(n)]
            (folder / f"{split}.{lang}").write_text("\n".join(lines) + "\n")
    for name, data in sides.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return DataConfig("parallel_text", "xx", "yy", path=str(folder))


def test_parallel_text_plain_and_gzipped(tmp_path):
    config = write_corpus(tmp_path / "text")
    for lang in ("xx", "yy"):
        lines = "".join(f"extra {lang} {i}\n" for i in range(3))
        with gzip.open(tmp_path / "text" / f"test_2016.{lang}.gz", "wt") as f:
            f.write(lines)
    corpus = open_corpus(config, tmp_path / "c")
    assert {k: len(v) for k, v in corpus.items()} == {"train": 6, "valid": 6, "test_2016": 3}
    assert corpus["test_2016"].read([2, 0]) == [
        (b"extra xx 2", b"extra yy 2"),
        (b"extra xx 0", b"extra yy 0"),
    ]


def test_wrong_parallel_text(tmp_path):
    def message(config):
        with pytest.raises(UserError) as e:
            open_corpus(config, tmp_path / "c")
        assert "\n" not in str(e.value)
        return str(e.value)

    missing = DataConfig("parallel_text", "xx", "yy", path=str(tmp_path / "none"))
    assert "none does not exist" in message(missing)
    config = write_corpus(tmp_path / "a", train_yy=b"one\ntwo\n")
    assert "train.xx has 6 lines but" in message(config)
    assert "train.yy has 2" in message(config)
    config = write_corpus(tmp_path / "b", valid_xx=b"a\nb\0c\n")
    assert "valid.xx is not text: line 2" in message(config)
    config = write_corpus(tmp_path / "d")
    (tmp_path / "d" / "valid.yy").unlink()
    assert "has no valid.yy" in message(config)
    (tmp_path / "d" / "valid.yy.gz").write_bytes(b"\x1f\x8b\x08garbage")
    assert "valid.yy.gz is not a whole gzip file" in message(config)
    config = write_corpus(tmp_path / "e")
    (tmp_path / "e" / "test.xx").write_bytes(b"one side alone\n")
    (tmp_path / "e" / "test.yy").unlink(missing_ok=True)
    assert "has no test.yy; give both sides or neither" in message(config)


def test_empty_and_strange_files(tmp_path):
    config = write_corpus(tmp_path / "text", valid_xx=b"", valid_yy=b"")
    with pytest.raises(UserError, match=r"valid\.xx is empty"):
        open_corpus(config, tmp_path / "a")
    config = write_corpus(tmp_path / "text")
    for name in ("train.tok", "my set", "all", "test-2"):  # no splits, whatever they are
        for lang in ("xx", "yy"):
            (tmp_path / "text" / f"{name}.{lang}").write_text("a\n")
    assert set(open_corpus(config, tmp_path / "b")) == {"train", "valid"}


def text_alone(folder, pairs):
    """A corpus folder with nothing but training text."""
    xx, yy = (b"".join(line + b"\n" for line in side) for side in zip(*pairs, strict=True))
    config = write_corpus(folder, train_xx=xx, train_yy=yy)
    for lang in ("xx", "yy"):
        (folder / f"valid.{lang}").unlink()
    return config


def splits_of(config, folder):
    corpus = open_corpus(config, folder)
    return {name: own.read(range(len(own))) for name, own in corpus.items()}


@pytest.mark.parametrize("tests", [(), ("test",), ("test_2016",)])
def test_splits_that_are_missing_are_taken_out(tmp_path, tests):
    """Pairs whose source occurs once, wherever in the text they are."""
    pairs = [(b"source %d" % min(i, 1000), b"target %d" % i) for i in range(1500)]
    taken = ["valid"] if "test" in tests else ["valid", "test"]
    found = []
    for name, own in (("a", pairs), ("b", pairs[::-1])):
        config = text_alone(tmp_path / name, own)
        for lang, test in itertools.product(("xx", "yy"), tests):
            (tmp_path / name / f"{test}.{lang}").write_text("a test\n")
        assert taken_out(config) == taken
        found.append(splits_of(config, tmp_path / f"{name}_corpus"))
        assert found[-1].keys() == {"train", "valid", "test", *tests}
        parts = [found[-1][part] for part in ("train", *taken)]
        assert sorted(itertools.chain(*parts)) == sorted(pairs)
        assert [len(part) for part in parts[1:]] == [50] * len(taken)
        assert all(source != b"source 1000" for part in parts[1:] for source, _ in part)
    assert sorted(found[0]["valid"]) == sorted(found[1]["valid"]) != sorted(found[0]["test"])


def test_what_is_taken_out_of_a_text_that_is_packed_moved_or_joined(tmp_path):
    pairs = [(b"source %d" % i, b"target %d" % i) for i in range(60)]
    config = text_alone(tmp_path / "a", pairs)
    before = splits_of(config, tmp_path / "a_corpus")
    packed = text_alone(tmp_path / "b", pairs)
    for lang in ("xx", "yy"):
        plain = tmp_path / "b" / f"train.{lang}"
        plain.with_name(f"train.{lang}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert splits_of(packed, tmp_path / "b_corpus") == before
    for lang in ("xx", "yy"):
        (tmp_path / "a" / f"valid.{lang}").write_text("a line\n")
    with pytest.raises(UserError, match="has changed since"):
        open_corpus(config, tmp_path / "a_corpus")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert splits_of(config, tmp_path / "a_corpus") == before


def test_texts_that_nothing_is_taken_out_of(tmp_path):
    pairs = [(b"source %d" % (i // 2), b"target") for i in range(100)]
    config = text_alone(tmp_path / "a", pairs)
    with pytest.raises(UserError, match=r"train\.xx has 0 lines that occur once, too few to take"):
        open_corpus(config, tmp_path / "c")
    (tmp_path / "a" / "dev.xx").write_text("a line\n")
    with pytest.raises(UserError, match=r"has dev\.xx; rename it to valid"):
        open_corpus(config, tmp_path / "c")


def test_prepared_text_outlives_its_files(tmp_path):
    config = write_corpus(tmp_path / "text")
    before = open_corpus(config, tmp_path / "c")["valid"].read([1])
    (tmp_path / "text").rename(tmp_path / "moved")
    assert open_corpus(config, tmp_path / "c")["valid"].read([1]) == before


def test_changed_text_is_refused(tmp_path):
    config = write_corpus(tmp_path / "a")
    open_corpus(config, tmp_path / "c")
    open_corpus(config, tmp_path / "c")  # again: nothing to do
    (tmp_path / "a" / "train.xx").write_text("other\n" * 6)
    with pytest.raises(UserError, match="has changed since"):
        open_corpus(config, tmp_path / "c")
    # Unless nothing was made from it: the text was wrong, and is mended.
    assert open_corpus(config, tmp_path / "c", unused=True)["train"].read([0])[0][0] == b"other"


# --- WMT -----------------------------------------------------------------------------------------


def test_wmt_without_a_network_answers_at_once(tmp_path, monkeypatch):
    from automoe_jax.data import wmt  # noqa: PLC0415

    monkeypatch.setattr(wmt, "reachable", lambda url: False)
    for name in wmt.CORPORA:
        start = time.monotonic()
        config = DataConfig("tfds", "en", name.split("/")[1][:2], name=name, data_dir=str(tmp_path))
        with pytest.raises(UserError) as e:
            open_corpus(config, tmp_path / "c")
        assert time.monotonic() - start < 5
        text = str(e.value)
        assert "\n" not in text
        assert "dev.tgz" in text
        assert str(tmp_path / "downloads" / "manual") in text


def test_unreachable_server_is_told_in_seconds():
    from automoe_jax.data.network import reachable  # noqa: PLC0415

    start = time.monotonic()
    assert not reachable("http://127.0.0.1:9/x", seconds=2)
    assert not reachable("http://no.such.host.invalid/x", seconds=2)
    assert time.monotonic() - start < 6


def test_wmt_hat_sets_are_read(tmp_path, monkeypatch):
    """HAT's validation and test sets come out of TFDS's own readers, from downloaded files."""
    from tensorflow_datasets.core.download.download_manager import (  # noqa: PLC0415
        DownloadManager,
    )

    from automoe_jax.data import wmt  # noqa: PLC0415

    unpacked = tmp_path / "unpacked"
    (unpacked / "dev").mkdir(parents=True)
    for year, words in ((2012, "zwölf"), (2013, "dreizehn")):
        (unpacked / "dev" / f"newstest{year}.fr").write_text(f"fr {words}")
        (unpacked / "dev" / f"newstest{year}.en").write_text(f"en {words}")
    for side, lang in (("src", "fr"), ("ref", "en")):
        path = unpacked / "dev" / f"newstest2014-fren-{side}.{lang}.sgm"
        path.write_text(f'<doc>\n<seg id="1">{lang} vierzehn</seg>\n</doc>\n')
    monkeypatch.setattr(wmt, "reachable", lambda url: True)

    def fake(self, urls):
        return (
            {k: [str(unpacked)] * len(v) for k, v in urls.items()} if isinstance(urls, dict) else []
        )

    monkeypatch.setattr(DownloadManager, "download_and_extract", fake)
    builder = wmt._prepared(
        wmt.WmtHatEval, "fr-en.wmt14", tmp_path / "tfds", "wmt14_translate/fr-en"
    )
    valid = builder.as_data_source(split="validation")
    assert sorted(row["fr"].decode() for row in valid) == ["fr dreizehn", "fr zwölf"]
    test = builder.as_data_source(split="test")
    assert [(row["fr"], row["en"]) for row in test] == [(b"fr vierzehn", b"en vierzehn")]


# --- tokens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tok") / "tokenizer"
    text = [s for pair in phrases.pairs("train", 800) for s in pair]
    train(text, folder, TokenizerConfig(vocab_size=400, split_digits=True))
    return tokenizers.load(folder)


def test_tokenizer(tokenizer):
    assert tokenizer.vocab_sizes == (400, 400)
    (ids,) = tokenizer.encode(["The meeting is on Monday, 3 March 2025."])
    assert ids[-1] == 2
    assert 1 not in ids
    assert tokenizer.decode([[0, *ids, 1, 1]]) == ["The meeting is on Monday, 3 March 2025."]


def test_a_tokenizer_that_lower_cases(tokenizer, tmp_path):
    text = [s for pair in phrases.pairs("train", 800) for s in pair]
    train(text, tmp_path / "t", TokenizerConfig(vocab_size=400, lowercase=True))
    lower = tokenizers.load(tmp_path / "t")
    upper, same = lower.encode(["THE Meeting is in the Straße.", "the meeting is in the straße."])
    assert upper == same
    assert lower.decode([upper]) == ["the meeting is in the straße."]
    tokenizers.copy(tmp_path / "t", tmp_path / "copy")
    assert tokenizers.load(tmp_path / "copy").content == lower.content != tokenizer.content
    # The case is part of what it is: the same pieces without it are another tokenizer.
    settings = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps({**settings, "lowercase": False}))
    assert tokenizers.load(tmp_path / "copy").content != lower.content


def test_too_large_a_vocabulary_is_one_line(tmp_path):
    with pytest.raises(UserError) as e:
        train(["a b c", "d e"] * 10, tmp_path / "t", TokenizerConfig(vocab_size=32768))
    assert "tokenizer.vocab_size 32768 does not fit" in str(e.value)
    assert "it is too large; give --config.tokenizer.vocab_size=" in str(e.value)
    assert "\n" not in str(e.value)


def test_too_small_a_vocabulary_is_one_line(tmp_path):
    text = ["".join(map(chr, range(97, 123)))] * 10
    with pytest.raises(UserError, match="smaller than the number of signs; give more than"):
        train(text, tmp_path / "t", TokenizerConfig(vocab_size=8))


class Lines:
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def read(self, indices):
        return [self.pairs[i] for i in indices]


def test_unusable_pairs_are_counted(tokenizer, tmp_path):
    good = (b"Today is Monday.", b"Heute ist Montag.")
    bad = [(b"", b"x"), (b"x", b"  "), (b"\xff", b"x"), (b"x", b"long " * 200)]
    tokens.tokenize(Lines([good, *bad, good]), tokenizer, 50, tmp_path / "t")
    pairs = tokens.load(tmp_path / "t")
    assert pairs.counts == {"kept": 2, "empty": 2, "too_long": 1, "not_utf8": 1}
    assert tokenizer.decode([pairs.source[1]]) == ["Today is Monday."]
    assert pairs.target[0][-1] == 2


# --- plans and batches ---------------------------------------------------------------------------


def run_of(data, vocab_size: int, path) -> Run:
    config = dataclasses.replace(
        resolve(base()), data=data, tokenizer=TokenizerConfig(vocab_size=vocab_size)
    )
    return Run(config, path, Silent())


def test_a_foreign_tokenizer_is_not_mixed_in(tmp_path):
    config = write_corpus(tmp_path / "text", n=30)
    for name, size in (("a", 40), ("b", 41)):
        prepare(run_of(config, size, tmp_path / name))
    with pytest.raises(UserError, match="is not the tokenizer of the model that this one starts"):
        prepare(run_of(config, 40, tmp_path / "a"), tmp_path / "b")
    inherited = prepare(run_of(config, 40, tmp_path / "c"), tmp_path / "b")
    assert inherited.tokenizer.vocab_sizes == (41, 41)


def test_text_that_changed_after_tokenising_is_refused(tmp_path):
    config = write_corpus(tmp_path / "text", n=30)
    run = run_of(config, 40, tmp_path / "a")
    prepare(run)
    prepare(run)
    (tmp_path / "text" / "train.xx").write_text("other\n" * 30)
    with pytest.raises(UserError, match="has changed since"):
        prepare(run)
    (tmp_path / "text").rename(tmp_path / "moved")  # tokens are enough
    prepare(run)


def test_a_split_of_nothing_usable_says_so_every_time(tmp_path):
    config = write_corpus(tmp_path / "text", valid_xx=b"\n" * 6)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no pair of valid can be used \(6 empty\)"):
            prepare(run_of(config, 40, tmp_path / "a"))


@st.composite
def length_lists(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 400))
    source = rng.integers(2, draw(st.integers(3, 60)), n)
    target = np.clip(source + rng.integers(-3, 4, n), 1, 64)
    return source, target, draw(st.integers(1, 6)), draw(st.integers(1, 4))


@hypothesis.given(length_lists())
def test_plan_covers_every_pair_once_per_epoch(case):
    source, target, n_buckets, per_step = case
    buckets = choose_buckets(source, target, n_buckets, 128)
    assert 1 <= len(buckets) <= n_buckets
    plan = Plan(source, target, buckets, per_step, seed=3)
    seen = []
    for step in plan.epoch(0):
        assert step.pairs.shape == (per_step, step.bucket.rows)
        assert step.bucket.rows * max(step.bucket.source, step.bucket.target) <= 128
        pairs = step.pairs[step.pairs >= 0]
        assert (source[pairs] <= step.bucket.source).all()
        assert (target[pairs] <= step.bucket.target).all()
        seen += pairs.tolist()
    assert sorted(seen) == list(range(len(source)))
    assert len(plan.epoch(1)) == plan.steps_per_epoch


def test_plan_is_a_pure_function():
    rng = np.random.default_rng(0)
    source, target = rng.integers(2, 40, (2, 500))
    buckets = choose_buckets(source, target, 4, 256)

    def flat(seed, epoch):
        plan = Plan(source, target, buckets, 2, seed)
        return np.concatenate([s.pairs.reshape(-1) for s in plan.epoch(epoch)])

    np.testing.assert_array_equal(flat(1, 0), flat(1, 0))
    assert (flat(1, 0) != flat(1, 1)).any()
    assert (flat(1, 0) != flat(2, 0)).any()
    plan = Plan(source, target, buckets, 2, 1)
    n = plan.steps_per_epoch
    np.testing.assert_array_equal(plan.step(n + 2).pairs, plan.epoch(1)[2].pairs)


def test_batch_shapes_join_one_by_one():
    """A new shape every few steps, the most frequent first; then all of them at random."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 20_000)
    plan = Plan(lengths, lengths, choose_buckets(lengths, lengths, 5, 400), 2, seed=1)
    buckets = [step.bucket for step in plan.epoch(0)]
    every = len(buckets) // 10
    assert every < JOIN_EVERY
    first = {bucket: buckets.index(bucket) for bucket in plan.shapes(0, len(buckets))}
    for i, step in enumerate(first.values()):
        assert every * i <= step < every * (i + 1)
    counts = [buckets.count(bucket) for bucket in first]
    assert counts == sorted(counts, reverse=True)
    assert plan.shapes(0, every) == [buckets[0]]
    later = [step.bucket for step in plan.epoch(1)]
    assert sorted(map(str, later)) == sorted(map(str, buckets))
    assert len(set(later[:every])) == 5


def test_longest_pair_must_fit_a_batch():
    with pytest.raises(UserError, match="tokens_per_batch is 10"):
        choose_buckets(np.array([5, 12]), np.array([5, 5]), 2, 10)


def some_pairs(n=300):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, (2, n))
    source, target = (
        tokens.Side(rng.integers(4, 60, x.sum()).astype(np.uint16), np.cumsum([0, *x]))
        for x in lengths
    )
    return tokens.TokenPairs(source, target, {})


def test_batches_are_seekable_and_independent_of_processes():
    pairs = some_pairs()
    source, target = pairs.source.lengths, pairs.target.lengths
    plan = Plan(source, target, choose_buckets(source, target, 3, 128), 4, seed=0)
    whole = list(batches.batches(pairs, plan, batches.Share(0, 4, 4), 0, 20))
    later = list(batches.batches(pairs, plan, batches.Share(0, 4, 4), 13, 20))
    assert len(whole) == 20
    for a, b in zip(whole[13:], later, strict=True):
        np.testing.assert_array_equal(a["source"], b["source"])
    parts = [list(batches.batches(pairs, plan, batches.Share(d, 2, 4), 0, 20)) for d in (0, 2)]
    for a, first, second in zip(whole, *parts, strict=True):
        for side in ("source", "target"):
            np.testing.assert_array_equal(a[side], np.concatenate([first[side], second[side]]))
    batch, step = whole[7], plan.step(7)
    i = step.pairs[2, 0]
    row = batch["target"][2, 0, 0]
    np.testing.assert_array_equal(row[: target[i]], pairs.target[i])
    assert (row[target[i] :] == 1).all()


def test_multi30k_padding_is_below_15_percent(shared, tmp_path):
    """With the settings of configs/multi30k.py."""
    run = shipped_config("multi30k")
    data = dataclasses.replace(run.data, path=str(shared / "data/multi30k"))
    corpus = open_corpus(data, tmp_path / "c")
    train(tokens.sample_sentences(corpus["train"], 10**6), tmp_path / "t", run.tokenizer)
    tokens.tokenize(
        corpus["train"], tokenizers.load(tmp_path / "t"), data.max_length, tmp_path / "x"
    )
    pairs = tokens.load(tmp_path / "x")
    assert pairs.counts["kept"] == 29_000
    source, target = pairs.source.lengths, pairs.target.lengths
    for config in (run.training, run.subnet_training):
        buckets = choose_buckets(source, target, config.buckets, config.tokens_per_batch)
        plan = Plan(source, target, buckets, config.batches_per_step, 0)
        assert plan.padding < 0.15
