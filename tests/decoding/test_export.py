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
from conftest import ROOT, VOCAB, elastic_space, random_params
from programs import launch
from safetensors.numpy import load_file

from automoe_jax.architecture.ids import EOS_ID
from automoe_jax.data import phrases
from automoe_jax.data.lexicon import Lexicon
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.data.tokenizers.sentence_piece import train
from automoe_jax.decoding import beam, native, weight_file
from automoe_jax.decoding import xla_engine as model
from automoe_jax.decoding.batching import pad
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.export import export
from automoe_jax.decoding.translator import Translator
from automoe_jax.decoding.weights import prepare
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.model.extract import extract
from automoe_jax.system.errors import UserError

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
needs_kernels = pytest.mark.skipif(not native.available(), reason=native.reason())
SPEC = ModelSpec(SUBNET, HULL.encoder.embed_dim, HULL.decoder.embed_dim)


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
    search = jax.jit(functools.partial(beam.search, model, SPEC, VOCAB, 3, weights))
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


@pytest.fixture(scope="module")
def quantized(folder, own_params):
    path = folder.with_name("int8")
    config = ExportConfig((3,), quantize="int8")
    export(own_params, SPEC, config, path, "test", folder.with_name("tokenizer"), ("en", "de"))
    return path


@needs_kernels
def test_both_kinds_of_programs_give_the_same(translator, folder, quantized):
    texts = sources(30, seed=2)
    for path, tolerance in ((folder, 1e-4), (quantized, 1e-3)):
        found = [
            Translator.load(path, kernels=kernels).translate_ids(texts, 3, max_length=30)
            for kernels in ("native", "xla")
        ]
        scores = [[t.score for t in translations] for translations in found]
        np.testing.assert_allclose(*scores, atol=tolerance)
        ids = [[t.hypotheses[0].ids for t in translations] for translations in found]
        assert sum(a != b for a, b in zip(*ids, strict=True)) <= (0 if path == folder else 3)


def test_quantized(folder, quantized, translator):
    """Smaller, and still the same model: scores of the same tokens are close."""
    small, large = (json.loads((f / "manifest.json").read_text()) for f in (quantized, folder))
    assert small["quantization"] == "int8"
    assert large["quantization"] == "none"
    weights = weight_file.load(quantized / "weights.safetensors")
    assert weights["decoder.0.qkv.kernel"].dtype == np.int8
    assert weights["embedding"].dtype == np.float32
    texts = sources(30, seed=2)
    plain = translator.translate_ids(texts, 3, max_length=30)
    found = Translator.load(quantized).translate_ids(texts, 3, max_length=30)
    difference = [a.score - b.score for a, b in zip(plain, found, strict=True)]
    assert np.abs(np.mean(difference)) < 0.05
    assert any(difference)  # it is another program


@pytest.mark.parametrize("quantize", [pytest.param("none", marks=pytest.mark.slow), "int8"])
def test_shortlist(own_params, tmp_path, quantize):
    """Only words of the lists come; both kinds of programs agree; a list of all words is exact."""
    rng = np.random.default_rng(0)
    words = np.stack([rng.permutation(VOCAB)[:4] for _ in range(VOCAB)]).astype(np.int32)
    words[::5, 2:] = -1
    some = Lexicon(words, np.array([EOS_ID, 3, 7], np.int32))
    every = Lexicon(words, np.arange(VOCAB, dtype=np.int32))
    config = ExportConfig((3,), quantize=quantize)
    for name, lexicon in (("some", some), ("every", every), ("none", None)):
        export(own_params, SPEC, config, tmp_path / name, "test", lexicon=lexicon, programs=False)
    texts = sources(20, seed=3)

    def found(name, kernels="auto"):
        return Translator.load(tmp_path / name, kernels=kernels).translate_ids(texts, 3, 0.6, 3, 20)

    listed, by_xla = found("some"), found("some", "xla")
    tolerance = 1e-4 if quantize == "none" else 1e-2
    for source, ours, theirs in zip(texts, listed, by_xla, strict=True):
        allowed = {*some.common_F.tolist(), *words[source].ravel().tolist()}
        assert all(set(h.ids) <= allowed for h in ours.hypotheses)
        assert ours.score == pytest.approx(theirs.score, abs=tolerance)
    if quantize == "none":  # the output layer of a shortlist stays fp32
        scores = [[t.score for t in found(name)] for name in ("every", "none")]
        np.testing.assert_allclose(*scores, atol=1e-4)


def test_without_programs(own_params, translator, tmp_path):
    """An export translates by the programs that are traced here; it has none to be trusted."""
    export(own_params, SPEC, ExportConfig((3,)), tmp_path / "x", "test", programs=False)
    assert not list((tmp_path / "x").glob("*.jaxexport"))
    texts = sources(3)
    ours, theirs = (
        [t.score for t in own.translate_ids(texts, 3, max_length=9)]
        for own in (Translator.load(tmp_path / "x"), translator)
    )
    assert ours == theirs
    with pytest.raises(UserError, match=r"program .*beam3_.*\.jaxexport cannot be read"):
        Translator.load(tmp_path / "x", trust=True).translate_ids(texts, 3)


def test_without_kernels(folder, monkeypatch):
    """No compiler: XLA's operations, and the reason at hand."""
    monkeypatch.setattr(native, "reason", lambda: "no C compiler was found")
    fallen_back = Translator.load(folder)
    assert (fallen_back.kernels, fallen_back.why_xla) == ("xla", "no C compiler was found")
    assert fallen_back.translate_ids(sources(2), 3, max_length=5)[0].score < 0
    with pytest.raises(UserError, match="no C compiler was found; use --kernels=xla"):
        Translator.load(folder, kernels="native")
    with pytest.raises(UserError, match="allowed: auto, native, xla"):
        Translator.load(folder, kernels="fast")


def test_exported_for_one_kind_only(own_params, tmp_path):
    config = ExportConfig((1,))
    export(own_params, SPEC, config, tmp_path / "x", "test", kernels=("xla",), programs=False)
    translator = Translator.load(tmp_path / "x")
    assert translator.kernels == "xla"
    assert "has no program for them" in translator.why_xla


def test_weights_are_mapped(folder, tmp_path):
    """As the library reads them, aligned, and not copied on the way to the device."""
    path = folder / "weights.safetensors"
    mapped = weight_file.load(path)
    expected = load_file(path)
    assert mapped.keys() == expected.keys()
    for name, array in mapped.items():
        np.testing.assert_array_equal(array, expected[name])
        assert not array.flags.writeable
    large = {"x": np.arange(64, dtype=np.float32).reshape(16, 4), "y": np.ones(3, np.int8)}
    weight_file.save(tmp_path / "w", large)
    x = weight_file.load(tmp_path / "w")["x"]
    assert x.ctypes.data % 64 == 0
    assert jax.device_put(x).unsafe_buffer_pointer() == x.ctypes.data


@pytest.mark.parametrize("given", ["one sentence", [1], [None]])
def test_what_are_no_sentences(translator, given):
    with pytest.raises(UserError, match="must be a list of strings"):
        translator.translate(given)


def test_hypotheses_are_ranked(translator):
    for found in translator.translate_ids(sources(10), 3, max_length=20, num_hypotheses=3):
        scores = [h.score for h in found.hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({h.ids for h in found.hypotheses}) == len(scores)


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
    lines = ["", "  ", "today is monday.", "\u2603 \U0001f600", "a " * 10_000]
    found = translator.translate(lines, beam_size=1, max_length=5)
    assert [t.text for t in found[:2]] == ["", ""]
    assert [t.cut for t in found] == [False, False, False, False, True]
    assert translator.translate([]) == []


def test_only_an_export_is_replaced(own_params, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is not an export"):
        export(own_params, SPEC, ExportConfig((1,)), tmp_path / "mine", "test", programs=False)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    shutil.copytree(folder, tmp_path / "x")
    export(own_params, SPEC, ExportConfig((1,)), tmp_path / "x", "new weights", programs=False)
    assert Translator.load(tmp_path / "x").manifest["weights_from"] == "new weights"


def test_no_words_at_all(translator):
    found = translator.translate_ids([[], [5, EOS_ID], []], beam_size=3, max_length=4)
    assert [t.text for t in found] == ["", "", ""]
    assert [bool(t.hypotheses[0].ids) for t in found] == [False, True, False]


def test_what_is_refused(translator, folder, tmp_path):
    for ids in ([-1, EOS_ID], [VOCAB, EOS_ID]):
        with pytest.raises(UserError, match=f"the model has 0 to {VOCAB - 1}"):
            translator.translate_ids([[5, EOS_ID], ids], beam_size=3)
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
    with pytest.raises(UserError, match=r"no export, or not a whole one: it has no manifest\.json"):
        Translator.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "program_beam3_native.jaxexport", "manifest.json"]
)
def test_damaged_export_is_one_line(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / name
    path.write_bytes(path.read_bytes()[:-100] if name != "manifest.json" else b"{")
    trust = path.suffix == ".jaxexport"  # not read otherwise
    with pytest.raises(UserError) as e:
        Translator.load(tmp_path / "x", trust=trust).translate(["a"], beam_size=3)
    assert name in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kernels", ["native", "xla"])
def test_export_replaced_while_it_is_loaded(folder, tmp_path, kernels):
    if kernels == "native" and not native.available():
        pytest.skip(native.reason())
    copy = shutil.copytree(folder, tmp_path / "x")
    translator, trusting = (
        Translator.load(copy, kernels=kernels, trust=trust) for trust in (False, True)
    )
    before = Translator.load(copy, kernels=kernels).translate(["today is monday."])
    other = SPACE.sample(np.random.default_rng(5))
    export(
        jax.tree.map(np.asarray, extract(PARAMS, other, HULL)),
        ModelSpec(other, HULL.encoder.embed_dim, HULL.decoder.embed_dim),
        ExportConfig((1, 3)), copy, "test", folder / "tokenizer", ("en", "de"), [],
    )  # fmt: skip
    assert translator.translate(["today is monday."]) == before
    with pytest.raises(UserError, match="load the export again"):
        trusting.translate(["today is monday."])


def test_weights_of_another_subnet(folder, tmp_path):
    """The manifest's subnet says which arrays there are."""
    copy = shutil.copytree(folder, tmp_path / "x")
    weights = dict(weight_file.load(folder / "weights.safetensors"))
    bias = "encoder.0.qkv.bias"
    for change, reason in (
        ({bias: np.zeros(7, np.float32)}, rf"{bias} is float32 \(7,\), not float32 \(\d+,\)"),
        ({bias: weights[bias].astype(np.int32)}, f"{bias} is int32"),
        ({"encoder.9.qkv.bias": weights[bias]}, "encoder.9.qkv.bias is not an array"),
    ):
        weight_file.save(copy / "weights.safetensors", weights | change)
        with pytest.raises(UserError, match=reason):
            Translator.load(copy)
    weight_file.save(copy / "weights.safetensors", {n: weights[n] for n in weights if n != bias})
    with pytest.raises(UserError, match=f"{bias} is missing"):
        Translator.load(copy)


def test_memory_is_released_around_compilations(folder):
    """The library asks its caller to; each shape compiles once."""
    calls = []
    translator = Translator.load(folder, release_memory=lambda: calls.append("release"))
    assert calls == []
    for _ in range(2):
        translator.translate_ids([[5, EOS_ID]], 1, max_length=4)
    assert calls == ["release"] * 2


def test_nothing_of_training_is_imported(folder):
    """A fresh process loads the export and translates without the training code."""
    code = f"""
import sys
from automoe_jax import Translator
out = Translator.load({str(folder)!r}).translate(["today is monday."], beam_size=1, max_length=8)
heavy = ["flax", "safetensors", "optax", "orbax", "tensorflow_datasets", "grain", "torch"]
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


def test_strange_lines_from_a_pipe(folder):
    """Each line gives one line; what was wrong with it is counted."""
    lines = [
        b"",
        b"today is monday.",
        b"\xff\xfe",
        b"a\0b",
        "\u2603 \U0001f600".encode(),
        b"a " * 9000,
    ]
    done = launch(
        "translate",
        f"--export={folder}",
        "--beam_size=1",
        "--max_length=4",
        stdin=b"\n".join(lines),
    )
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode().split("\n")
    assert len(out) == len(lines) + 1
    assert out[0] == ""
    assert "2 line(s) not UTF-8 text" in done.stderr.decode()
    assert "1 line(s) longer than 1024 tokens were cut" in done.stderr.decode()


def test_translations_come_as_lines_come(folder):
    """A program at the other end of the pipe can wait for each translation."""
    command = [sys.executable, ROOT / "launch/translate.py", f"--export={folder}", "--beam_size=1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--max_length=4"], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdin.write(b"today is monday.\n")
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        rest, _ = process.communicate()
    assert rest == b""
