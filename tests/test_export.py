"""Invariant 7: the exported translator is exact, and needs neither training code nor pickle."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, elastic_space, random_params

from automoe_jax.data import phrases
from automoe_jax.data import tokenizer as tokenizers
from automoe_jax.data.sentence_piece import train
from automoe_jax.data.tokenizer import TokenizerConfig
from automoe_jax.decoding import beam
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.model import Spec
from automoe_jax.decoding.translator import Translator, pad
from automoe_jax.decoding.weights import prepare
from automoe_jax.errors import UserError
from automoe_jax.export import export
from automoe_jax.extract import extract
from automoe_jax.ids import EOS_ID

SPACE = elastic_space()
HULL = SPACE.hull()
PARAMS = random_params(SPACE)
# A subnet with every kind of layer: identity experts beside others, two experts per token.
SUBNET = next(
    s
    for s in map(SPACE.sample, map(np.random.default_rng, range(1000)))
    if all(
        any(0 in x.experts and any(x.experts) and x.top_k == 2 for x in side.layers)
        for side in (s.encoder, s.decoder)
    )
)
SPEC = Spec(SUBNET, HULL.encoder.embed_dim, HULL.decoder.embed_dim)


@pytest.fixture(scope="module")
def own_params():
    return jax.tree.map(np.asarray, extract(PARAMS, SUBNET, HULL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, own_params):
    root = tmp_path_factory.mktemp("export")
    text = [s for pair in phrases.pairs("train", 300) for s in pair]
    # As few pieces as the weights have words.
    train(
        [t.lower() for t in text],
        root / "tokenizer",
        TokenizerConfig(vocab_size=VOCAB, character_coverage=0.98),
    )
    export(
        own_params, SPEC, ExportConfig((1, 3)), root / "x", "test",
        root / "tokenizer", ("en", "de"), ["today is monday."],
    )  # fmt: skip
    return root / "x"


@pytest.fixture(scope="module")
def translator(folder):
    return Translator.load(folder)


def sources(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return [[*rng.integers(4, VOCAB, rng.integers(1, 40)).tolist(), EOS_ID] for _ in range(n)]


def test_export_gives_the_tokens_of_the_model(translator, own_params):
    """Every sentence alone through the model, all together through the export."""
    texts = sources()
    weights = jax.tree.map(jnp.asarray, prepare(own_params, SUBNET))
    search = jax.jit(functools.partial(beam.search, weights, SPEC, 3))
    found = translator.translate_ids(texts, beam_size=3, max_length=30, num_hypotheses=3)
    different = 0
    for source, translation in zip(texts, found, strict=True):
        out = search(
            pad([source], 1, 48), np.arange(31, dtype=np.int32), np.int32(1), np.int32(30),
            np.float32(0.6),
        )  # fmt: skip
        assert translation.score == pytest.approx(float(out.score_BJ[0, 0]), abs=1e-4)
        expected = np.asarray(out.tokens_BJT)[0, 0, : int(out.length_BJ[0, 0]) - 1]
        different += list(translation.hypotheses[0].ids) != expected.tolist()
        assert len(translation.hypotheses) <= 3
    assert different == 0


def test_order_batch_and_time_do_not_matter(translator):
    texts = sources(20, seed=1)
    together = translator.translate_ids(texts, beam_size=3)
    backwards = translator.translate_ids(texts[::-1], beam_size=3)[::-1]
    alone = [translator.translate_ids([t], beam_size=3)[0] for t in texts[:6]]
    assert [t.hypotheses[0].ids for t in together] == [t.hypotheses[0].ids for t in backwards]
    assert [t.hypotheses[0].ids for t in together[:6]] == [t.hypotheses[0].ids for t in alone]


def test_a_few_long_sentences_among_many_short_ones(translator):
    short = [[4 + i % (VOCAB - 4), EOS_ID] for i in range(140)]
    long = [s * 2 + [EOS_ID] for s in ([[7, 8, 9] * 4, [9, 8] * 5])]
    together = translator.translate_ids([*short[:70], *long, *short[70:]], 1, max_length=12)
    alone = translator.translate_ids(long, 1, max_length=12)
    assert [t.hypotheses for t in together[70:72]] == [t.hypotheses for t in alone]
    assert all(t.hypotheses[0].ids for t in together)


def test_strange_lines(translator):
    lines = ["", "  ", "today is monday.", "\u2603 \U0001f600", "a " * 3000]
    found = translator.translate(lines, beam_size=1, max_length=5)
    assert [t.text for t in found[:2]] == ["", ""]
    assert [t.cut for t in found] == [False, False, False, False, True]
    assert translator.translate([]) == []


def test_only_an_export_is_replaced(own_params, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is not an export"):
        export(own_params, SPEC, ExportConfig((1,)), tmp_path / "mine", "test")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    shutil.copytree(folder, tmp_path / "x")
    export(own_params, SPEC, ExportConfig((1,)), tmp_path / "x", "new weights")
    assert Translator.load(tmp_path / "x").manifest["weights_from"] == "new weights"


def test_what_is_refused(translator, folder, tmp_path):
    with pytest.raises(UserError, match="beam size 7 is not in export"):
        translator.translate(["a"], beam_size=7)
    for value in (float("nan"), -100.0):
        with pytest.raises(UserError, match="length_penalty is"):
            translator.translate(["a"], beam_size=3, length_penalty=value)
    with pytest.raises(UserError, match="max_length is 3000000000"):
        translator.translate(["a"], beam_size=3, max_length=3_000_000_000)
    with pytest.raises(UserError, match="num_hypotheses is 4"):
        translator.translate(["a"], beam_size=3, num_hypotheses=4)
    with pytest.raises(UserError, match="does not exist"):
        Translator.load(tmp_path / "none")
    with pytest.raises(UserError, match="was made for cpu"):
        Translator.load(folder, "gpu")
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        Translator.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "program_beam3.jaxexport", "manifest.json"]
)
def test_damaged_export_is_one_line(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / name
    path.write_bytes(path.read_bytes()[:-100] if name != "manifest.json" else b"{")
    with pytest.raises(UserError) as e:
        Translator.load(tmp_path / "x").translate(["a"], beam_size=3)
    assert name in str(e.value)
    assert "\n" not in str(e.value)


def test_nothing_of_training_is_imported(folder):
    """A fresh process loads the export and translates without the training code."""
    code = f"""
import sys
from automoe_jax.decoding.translator import Translator
out = Translator.load({str(folder)!r}).translate(["today is monday."], beam_size=1, max_length=8)
heavy = ["flax", "optax", "orbax", "tensorflow_datasets", "grain", "tensorflow", "torch"]
print([m for m in heavy if m in sys.modules], repr(out[0].text))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("[] ")


def test_manifest_says_what_it_is(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["kind"] == "export"
    assert manifest["beam_sizes"] == [1, 3]
    assert manifest["weights_from"] == "test"
    assert manifest["languages"] == ["en", "de"]
    assert tokenizers.load(folder / "tokenizer").vocab_sizes == (VOCAB, VOCAB)
    assert not list(folder.rglob("*.pkl"))
