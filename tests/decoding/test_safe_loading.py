"""An export is data: it is checked, no code of it runs, and damage is one line."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, VOCAB, elastic_space, evolved_space, random_evolved, random_params

from automoe_jax.architecture.ids import EOS_ID
from automoe_jax.data import phrases
from automoe_jax.data.lexicon import Lexicon
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.data.tokenizers.sentence_piece import train
from automoe_jax.decoding import native, schema, weight_file
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.export import export
from automoe_jax.decoding.native_engine import _calls
from automoe_jax.decoding.translator import Translator
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.model.extract import extract
from automoe_jax.system import user_cache
from automoe_jax.system.errors import UserError

SPACE = elastic_space()
HULL = SPACE.hull()
SUBNET = SPACE.sample(np.random.default_rng(3))
SENTENCES = ["today is monday.", "", "a b c"]
TRANSFORMERS = ("fp32", "int8", "shortlist")
needs_kernels = pytest.mark.skipif(not native.available(), reason=native.reason())


def slow(*values: str):
    """A parameter of slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """The same subnet in fp32, in int8, and with a shortlist; evolved cells in fp32 and int8."""
    root = tmp_path_factory.mktemp("exports")
    text = [s for pair in phrases.pairs("train", 300) for s in pair]
    # As few pieces as the weights have words.
    settings = TokenizerConfig(vocab_size=VOCAB, character_coverage=0.98)
    train([t.lower() for t in text], root / "tokenizer", settings)
    params = jax.tree.map(np.asarray, extract(random_params(SPACE), SUBNET, HULL))
    spec = ModelSpec(SUBNET, HULL.encoder.embed_dim, HULL.decoder.embed_dim)
    rng = np.random.default_rng(0)
    words = rng.integers(-1, VOCAB, (VOCAB, 4)).astype(np.int32)
    lexicon = Lexicon(words, np.arange(12, dtype=np.int32))
    kinds = {
        "fp32": (ExportConfig((1, 3)), None),
        "int8": (ExportConfig((1, 3), quantize="int8"), None),
        "shortlist": (ExportConfig((1, 3), shortlist=4), lexicon),
    }
    for name, (config, own) in kinds.items():
        export(params, spec, config, root / name, "test", root / "tokenizer", ("en", "de"),
               lexicon=own)  # fmt: skip
    space, evolved = evolved_space(), random_evolved()
    spec = ModelSpec(
        space.largest(), space.hull().encoder.embed_dim, space.hull().decoder.embed_dim
    )
    for name, kind in (("evolved", "none"), ("evolved_int8", "int8")):
        config = ExportConfig((1, 3), quantize=kind)
        export(evolved, spec, config, root / name, "test", root / "tokenizer", ("en", "de"))
    return {path.name: path for path in root.iterdir() if path.name != "tokenizer"}


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        *(pytest.param(kind, "native", marks=needs_kernels) for kind in TRANSFORMERS),
        *((kind, "xla") for kind in ("fp32", "int8", "evolved")),
        *(slow(kind, "xla") for kind in ("shortlist", "evolved_int8")),
    ],
)
def test_own_programs_equal_the_exports(exports, kind, kernels):
    """Programs of other programs' use translate as those that are traced here."""
    own, trusted = (
        Translator.load(exports[kind], kernels=kernels, trust=trust) for trust in (False, True)
    )
    for beam in (1, 3):
        for a, b in zip(
            own.translate(SENTENCES, beam, max_length=12),
            trusted.translate(SENTENCES, beam, max_length=12),
            strict=True,
        ):
            assert [h.ids for h in a.hypotheses] == [h.ids for h in b.hypotheses]
            scores = [[h.score for h in x.hypotheses] for x in (a, b)]
            np.testing.assert_allclose(*scores, atol=1e-4)


def test_the_exports_programs_are_not_read(exports, tmp_path):
    folder = shutil.copytree(exports["fp32"], tmp_path / "x")
    expected = Translator.load(folder).translate(SENTENCES, 1, max_length=6)
    for path in folder.glob("*.jaxexport"):
        path.write_bytes(b"code")
    assert Translator.load(folder).translate(SENTENCES, 1, max_length=6) == expected
    with pytest.raises(UserError, match="cannot be read"):
        Translator.load(folder, trust=True).translate(SENTENCES, 1)


def test_incomplete_weights_say_what_to_do(exports, tmp_path):
    folder = shutil.copytree(exports["fp32"], tmp_path / "x")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cannot be read: .*copy the export again"):
        Translator.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"cannot be read: .*copy the export again"):
        Translator.load(folder)


def test_compiled_programs_lie_in_the_users_own_cache(exports, tmp_path):
    """In a process without a compilation cache; the export stays as it was."""
    folder = shutil.copytree(exports["fp32"], tmp_path / "x")
    before = sorted(folder.rglob("*"))
    code = (
        "import sys; from automoe_jax import Translator; "
        f"print(Translator.load({str(folder)!r}).translate(['a'], 1, max_length=4)[0].text)"
    )
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def run() -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True, cwd=ROOT
        )
        return done.stdout

    first = run()
    own = tmp_path / "cache" / "automoe_jax"
    (program,) = (own / "programs").iterdir()
    for path in (own, own / "programs"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    about = program.stat()
    assert run() == first
    assert program.stat().st_mtime_ns == about.st_mtime_ns  # read, not written again
    assert list((own / "programs").iterdir()) == [program]
    assert sorted(folder.rglob("*")) == before


def test_a_cache_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    shared = tmp_path / "automoe_jax"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        user_cache.private(shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    assert user_cache.folder() == tmp_path / "tmp" / f"automoe_jax-{os.getuid()}"
    shared.chmod(0o755)
    assert user_cache.folder() == shared


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocab_sizes", [64, 1 << 40], "vocab_sizes is .*; allowed: two sizes, 4 to"),
        ("vocab_sizes", [64], "vocab_sizes"),
        ("base_dims", [1, 1], "base_dims is .* at least the encoder's width"),
        ("beam_sizes", [0], "beam_sizes is .* sizes from 1 to"),
        ("beam_sizes", [], "beam_sizes"),
        ("beam_sizes", [10**9], "beam_sizes"),
        ("quantization", "int4", "quantization is 'int4'; allowed: none, int8"),
        ("shortlist", 1000, "shortlist is 1000; allowed: 0 to the 64 target words"),
        ("platforms", "cpu", "platforms is 'cpu'"),
        ("subnet", {}, "subnet: encoder|subnet: decoder"),
        ("samples", [1], "samples"),
        ("scores", None, "scores is None; allowed: an object"),
    ],
)
def test_the_manifest_is_checked_first(exports, tmp_path, name, value, message):
    folder = shutil.copytree(exports["fp32"], tmp_path / "x")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {name: value}))
    with pytest.raises(UserError, match=message) as e:
        Translator.load(folder)
    assert str(path) in str(e.value)
    del manifest[name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{name} is missing"):
        Translator.load(folder)


def test_sizes_of_a_manifest_are_bounded(exports, tmp_path):
    folder = shutil.copytree(exports["fp32"], tmp_path / "x")
    path = folder / "manifest.json"
    for field, value in (("embed_dim", 1 << 30), ("layers", schema.MOST_LAYERS + 1)):
        manifest = json.loads(path.read_text())
        encoder = manifest["subnet"]["encoder"]
        encoder[field] = encoder["layers"][:1] * value if field == "layers" else value
        path.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=rf"encoder\.{field} is {value}; at most"):
            Translator.load(folder)
        shutil.copy(exports["fp32"] / "manifest.json", path)


def test_words_of_a_shortlist_are_those_of_the_model(exports, tmp_path):
    folder = shutil.copytree(exports["shortlist"], tmp_path / "x")
    path = folder / "weights.safetensors"
    weights = {name: np.array(x) for name, x in weight_file.load(path).items()}
    for name in ("shortlist.words", "shortlist.common"):
        changed = {**weights, name: np.full_like(weights[name], VOCAB)}
        weight_file.save(path, changed)
        with pytest.raises(UserError, match=f"{name} has words {VOCAB} to {VOCAB}, of {VOCAB}"):
            Translator.load(folder)


def test_links_out_of_the_export_are_refused(exports, tmp_path):
    folder = shutil.copytree(exports["fp32"], tmp_path / "x")
    path = folder / "tokenizer" / "sentencepiece.model"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link out of the export"):
        Translator.load(folder)


def floats(*shape):
    return jnp.zeros(shape, jnp.float32)


def ints(*values: int):
    """A number, or an array of several."""
    return jnp.array(values, jnp.int32).reshape(() if len(values) == 1 else -1)


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


REFUSED = (ValueError, jax.errors.JaxRuntimeError)  # which of them depends on when it is noticed
HEADS = {"heads": np.int64(2)}
ROWS = ints(2)
# Calls whose arrays do not fit: each is one of a right call with one thing changed.
WRONG_CALLS = {
    "more rows than x": ("linear", [(2, 8)], [ints(3), floats(2, 4), floats(1, 4, 32), floats(8)]),
    "a kernel of other inputs": (
        "linear", [(2, 8)], [ROWS, floats(2, 5), floats(1, 4, 32), floats(8)],
    ),
    "a short bias": ("linear", [(2, 8)], [ROWS, floats(2, 4), floats(1, 4, 32), floats(7)]),
    "an argument too few": ("linear", [(2, 8)], [ROWS, floats(2, 4), floats(1, 4, 32)]),
    "ids of another type": (
        "embed", [(2, 4)], [ROWS, floats(2), ints(0, 1), floats(9, 4), floats(3, 4)],
    ),
    "an id beyond the table": (
        "embed", [(2, 4)], [ROWS, ints(0, 9), ints(0, 1), floats(9, 4), floats(3, 4)],
    ),
    "a position beyond the table": (
        "embed", [(2, 4)], [ROWS, ints(0, 8), ints(0, 3), floats(9, 4), floats(3, 4)],
    ),
    "a negative id": (
        "embed", [(2, 4)], [ROWS, ints(0, -1), ints(0, 1), floats(9, 4), floats(3, 4)],
    ),
    "norms of another width": (
        "linear_add_norm", [(2, 8)],
        [ROWS, floats(2, 8), floats(2, 4), floats(1, 4, 32), floats(8), floats(9), floats(8)],
    ),
    "a sentence beyond the words": (
        "encoder_attention", [(4, 4)], [ints(0, 2), ints(2, 3), floats(4, 12)], HEADS,
    ),
    "heads that do not divide": (
        "encoder_attention", [(4, 4)], [ints(0, 2), ints(2, 2), floats(4, 12)],
        {"heads": np.int64(3)},
    ),
    "a sentence that is not there": (
        "cross_attention", [(2, 4)],
        [ROWS, ints(0, 2), ints(0, 2), ints(2, 2), floats(2, 4), floats(4, 8)],
        HEADS | {"beams": np.int64(1)},
    ),
    "no beams": (
        "cross_attention", [(2, 4)],
        [ROWS, ints(0, 1), ints(0, 2), ints(2, 2), floats(2, 4), floats(4, 8)],
        HEADS | {"beams": np.int64(0)},
    ),
    "a step beyond the cache": (
        "self_attention", [(2, 4), (2, 3, 4), (2, 3, 4)],
        [ROWS, ints(3), jnp.zeros((2, 3), jnp.int32), floats(2, 12), floats(2, 3, 4),
         floats(2, 3, 4)], HEADS,
    ),
    "an ancestor that is no row": (
        "self_attention", [(2, 4), (2, 3, 4), (2, 3, 4)],
        [ROWS, ints(2), jnp.full((2, 3), 2, jnp.int32), floats(2, 12), floats(2, 3, 4),
         floats(2, 3, 4)], HEADS,
    ),
    "experts of other sizes": (
        "experts_add_norm", [(2, 8)],
        [ROWS, floats(2, 8), floats(1, 8, 32), floats(16), floats(1, 16, 32), floats(8),
         floats(8), floats(8)],
        {"sizes": np.array([24], np.int64), "top_k": np.int64(1)},
    ),
    "more experts a token than there are": (
        "experts_add_norm", [(2, 8)],
        [ROWS, floats(2, 8), floats(1, 8, 32), floats(16), floats(1, 16, 32), floats(8),
         floats(8), floats(8)],
        {"sizes": np.array([16], np.int64), "top_k": np.int64(2)},
    ),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("case", WRONG_CALLS)
def test_kernels_check_what_they_are_called_with(case):
    name, shapes, arguments, attributes = (*WRONG_CALLS[case], {})[:4]
    results = [abstract(*shape) for shape in shapes]
    call = jax.jit(lambda *xs: _calls(name, results, *xs, **attributes))
    with pytest.raises(REFUSED, match="do not fit it"):
        jax.block_until_ready(call(*arguments))


@needs_kernels
@pytest.mark.parametrize("wrong", [None, "words", "sentence", "table"])
def test_output_kernels_check_what_they_are_called_with(wrong):
    results = [abstract(2, 3), abstract(2, 3, dtype=jnp.int32), abstract(2)]
    numbers = {n: np.int64(i) for n, i in (("pad", 1), ("eos", EOS_ID), ("beams", 1))}
    numbers["words"] = np.int64(50 if wrong == "words" else 40)
    sentence = ints(0, 2) if wrong == "sentence" else ints(0, 1)
    table = floats(40, 5) if wrong == "table" else floats(40, 4)
    lists = jnp.full((2, 7), 90, jnp.int32)  # words that are not there are passed over
    arguments = (ROWS, sentence, floats(2, 4), table, lists, ints(0), ints(0))

    def call():
        return jax.block_until_ready(_calls("top_listed", results, *arguments, **numbers))

    if wrong is None:
        assert np.asarray(call()[1]).max() < 40
        return
    with pytest.raises(REFUSED, match="do not fit it"):
        call()


def fuzz(folder: Path, work: Path, kernels: str, first: int, count: int):
    """Loads changed exports in a child; neither it nor a translation may fail otherwise."""
    script = Path(__file__).with_name("fuzz_export.py")
    command = [sys.executable, script, folder, work, kernels, str(first), str(count)]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60 + 20 * count,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["wrong"]
    assert found["refused"] + found["translated"] == count
    assert found["refused"] > count // 4


KINDS = [
    ("fp32", "native"), ("int8", "native"), ("fp32", "xla"), ("int8", "xla"), ("evolved", "xla"),
    ("evolved_int8", "xla"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "kernels"), [*KINDS[:3], *(slow(*kind) for kind in KINDS[3:])])
def test_changed_exports_are_refused_or_load(exports, tmp_path, kind, kernels):
    if kernels == "native" and not native.available():
        pytest.skip(native.reason())
    fuzz(exports[kind], tmp_path, kernels, 10_000, 15)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kernels"), KINDS)
def test_a_thousand_changed_exports(exports, tmp_path, kind, kernels):
    if kernels == "native" and not native.available():
        pytest.skip(native.reason())
    fuzz(exports[kind], tmp_path, kernels, 250 * KINDS.index((kind, kernels)), 250)
