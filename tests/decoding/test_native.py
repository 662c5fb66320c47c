"""The kernels against NumPy, in every variant that this machine can run."""

import ctypes
import os
import platform
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.architecture.space import GATES
from automoe_jax.decoding import native
from automoe_jax.decoding.native_engine import _call, _calls
from automoe_jax.decoding.weights import pack, quantize, unpack
from automoe_jax.decoding.xla_engine import NEVER

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())
# Rows, inputs, outputs: odd ones, one row, more rows than a chunk, more columns than a panel.
SHAPES = [(1, 16, 16), (5, 23, 49), (9, 32, 64), (30, 64, 100), (130, 40, 33)]
REGISTERED: set[str] = set()
VARIANTS = {"portable": ("-O3",), "avx2": ("-O3", "-mavx2", "-mfma")}


@pytest.fixture(scope="module", params=["", *VARIANTS])
def variant(request, tmp_path_factory) -> str:
    """A prefix of the kernels' names: of this machine's, or of those for lesser ones."""
    name = request.param
    if name == "avx2" and platform.machine() != "x86_64":
        pytest.skip("AVX2 is of x86")
    if name and name not in REGISTERED:  # a worker that steals tests asks for a fixture again
        flags = ("-std=gnu11", *VARIANTS[name], "-shared", "-fPIC")
        library = ctypes.CDLL(str(native.build(tmp_path_factory.mktemp(name), flags)))
        for target in native.TARGETS:
            renamed = target.replace("automoe_", f"automoe_{name}_")
            jax.ffi.register_ffi_target(renamed, jax.ffi.pycapsule(library[target]), platform="cpu")
        REGISTERED.add(name)
    return f"{name}_" if name else ""


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(w_KN, kind="fp32") -> list[np.ndarray]:
    """A matrix in the kernels' layout, and what belongs to it."""
    weights = {"embedding": np.zeros((1, 1), np.float32), "x.kernel": w_KN}
    weights["x.bias"] = np.zeros(w_KN.shape[1], np.float32)
    weights = pack(quantize(weights) if kind == "int8" else weights)
    return [weights[f"x.{n}"] for n in ("kernel", "scale", "total") if f"x.{n}" in weights]


def int8_product(x, w):
    """As `quantize` says, in exact integers."""
    scale_w = np.abs(w).max(0) / 127
    top = np.abs(x).max(1, keepdims=True)
    q_w = np.rint(w / scale_w).astype(np.int64)
    q_x = np.rint(x * (np.float32(127) / top)).astype(np.int64)
    return (q_x @ q_w) * (top / 127) * scale_w


@pytest.mark.parametrize(("r", "k", "n"), SHAPES)
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_linear(variant, r, k, n, kind):
    x, w, b = floats(r, k), floats(k, n, seed=1), floats(n, seed=2)
    y = _call(f"{variant}linear", (r, n), jnp.int32(r), x, *packed(w, kind), b)
    expected = (x @ w if kind == "fp32" else int8_product(x, w)) + b
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_a_product_is_about_as_fast_as_xlas(variant):
    """Sums that are not kept in registers make it ten times slower, with the same results."""
    if variant == "portable_":
        pytest.skip("for CPUs without AVX2, where XLA too is slow")
    r, k, n = 5, 512, 4096
    x, w, b = floats(r, k), floats(k, n, seed=1), floats(n, seed=2)
    kernel = [jnp.asarray(a) for a in packed(w)]
    xs, ws, bs = jnp.asarray(x), jnp.asarray(w), jnp.asarray(b)
    ours = jax.jit(lambda: _call(f"{variant}linear", (r, n), jnp.int32(r), xs, *kernel, bs))
    xla = jax.jit(lambda x: x @ ws + bs)
    seconds = {"ours": float("inf"), "xla": float("inf")}
    for _ in range(30):  # the fastest of many in turns: other work on the machine does not count
        for name, f in (("ours", ours), ("xla", lambda: xla(xs))):
            start = time.perf_counter()
            jax.block_until_ready(f())
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    assert seconds["ours"] < 4 * seconds["xla"]


def norm(x, gamma, beta):
    c = x - x.mean(-1, keepdims=True)
    return c / np.sqrt((c * c).mean(-1, keepdims=True) + 1e-5) * gamma + beta


@pytest.mark.parametrize(("r", "k", "n"), SHAPES)
def test_linear_add_norm(variant, r, k, n):
    x, y, w = floats(r, n), floats(r, k, seed=1), floats(k, n, seed=2)
    b, gamma, beta = floats(3, n, seed=3)
    count = jnp.int32(r)
    got = _call(f"{variant}linear_add_norm", (r, n), count, x, y, *packed(w), b, gamma, beta)
    np.testing.assert_allclose(got, norm(x + y @ w + b, gamma, beta), atol=1e-5)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("sizes", "top_k"), [((24,), 1), ((0,), 1), ((24, 0, 40), 1), ((0, 24, 40, 7), 2)]
)
@pytest.mark.parametrize("rows", [1, 5, 60, 200])
def test_experts(variant, sizes, top_k, rows):
    check_experts(variant, sizes, top_k, rows)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_experts_of_more_hidden_rows_than_run_together(variant, kind):
    """Two experts have about a MiB of hidden rows each, and run in different groups."""
    check_experts(variant, (24, 2500, 0, 40, 2700), 2, 240, kind=kind)


@pytest.mark.parametrize("gate", ["count", "normalised"])
def test_gates_of_experts(gate):
    check_experts("", (24, 0, 40, 7), 2, 5, gate=gate)


@pytest.mark.parametrize("rows", [5, 200])
def test_int8_experts(variant, rows):
    check_experts(variant, (24, 0, 40, 7), 2, rows, kind="int8")


def check_experts(variant, sizes, top_k, rows, gate="probability", kind="fp32"):
    d = 20

    def times(x, w):
        return x @ w if kind == "fp32" else int8_product(x, w)

    x, gamma, beta = floats(rows, d), *floats(2, d, seed=1)
    matrices, y = [], np.zeros_like(x)
    p = np.ones((rows, 1), np.float32)
    if len(sizes) > 1:
        router, bias = floats(d, len(sizes), seed=2), floats(len(sizes), seed=3)
        p = softmax(x @ router + bias)
        p[p < np.sort(p, axis=1)[:, -top_k, None]] = 0
        if gate != "probability":
            p = p * len(sizes) if gate == "count" else p / p.sum(axis=1, keepdims=True)
        matrices += [router, bias]
    for e, size in enumerate(sizes):
        out = x
        if size:
            fc1, fc2 = floats(d, size, seed=10 + e), floats(size, d, seed=20 + e)
            b1, b2 = floats(size, seed=30 + e), floats(d, seed=40 + e)
            matrices += [*packed(fc1, kind), b1, *packed(fc2, kind), b2]
            out = np.maximum(times(x, fc1) + b1, 0)
            out = times(out.astype(np.float32), fc2) + b2
        y += p[:, e : e + 1] * out
    got = _call(
        f"{variant}experts_add_norm", x.shape, jnp.int32(rows), x, *matrices, gamma, beta,
        sizes=np.array(sizes, np.int64), top_k=np.int64(top_k), gate=np.int64(GATES.index(gate)),
    )  # fmt: skip
    expected = norm(x + y, gamma, beta)
    if kind == "fp32":
        np.testing.assert_allclose(got, expected, atol=3e-5)
    else:  # a hidden value beside a rounding border may be one step of 1 / 127 off
        assert np.mean(np.abs(got - expected) < 3e-5) > 0.9
        np.testing.assert_allclose(got, expected, atol=0.05)


def test_experts_of_two_kinds_are_refused():
    """A program that mixes fp32 and int8 would write more than there is memory for."""
    d, size, x = 16, 32, floats(4, 16)
    b1, b2 = np.zeros(size, np.float32), np.zeros(d, np.float32)
    mixed = []
    for kind in ("fp32", "int8"):
        mixed += [*packed(floats(d, size), kind), b1, *packed(floats(size, d), kind), b2]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        _call(
            "experts_add_norm", x.shape, jnp.int32(4), x, floats(d, 2), np.zeros(2, np.float32),
            *mixed, b2, b2, sizes=np.array([size, size], np.int64), top_k=np.int64(1),
            gate=np.int64(0),
        )  # fmt: skip


def test_an_expert_without_rows_is_not_read():
    """Its weights may be anything."""
    d, size, rows = 16, 32, 4
    x = floats(rows, d)
    one, bias = floats(d, size), np.zeros(size, np.float32)
    back, zeros = floats(size, d, seed=1), np.zeros(d, np.float32)
    used = [*packed(one), bias, *packed(back), zeros]
    router, chosen = np.zeros((d, 2), np.float32), np.array([50, 0], np.float32)

    def run(other):
        return _call(
            "experts_add_norm", x.shape, jnp.int32(rows), x, router, chosen, *used, *other,
            np.ones(d, np.float32), zeros, sizes=np.array([size, size], np.int64),
            top_k=np.int64(1), gate=np.int64(0),
        )  # fmt: skip

    unused = [np.full_like(w, np.nan) for w in used]
    np.testing.assert_array_equal(run(used), run(unused))


@pytest.mark.parametrize(("width", "heads", "lengths"), [(16, 4, [3, 5]), (48, 2, [7, 1, 20])])
def test_attention(variant, width, heads, lengths):
    n, b, j, size = sum(lengths), len(lengths), 3, width // heads
    start = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    length = np.array(lengths, np.int32)

    def attend(q, k, v):
        split = lambda x: x.reshape(len(x), heads, size).transpose(1, 0, 2)  # noqa: E731
        scores = split(q) @ split(k).transpose(0, 2, 1) / np.sqrt(size)
        return (softmax(scores) @ split(v)).transpose(1, 0, 2).reshape(len(q), width)

    qkv = floats(n + 3, 3 * width)  # with rows that belong to no sentence
    got = _call(
        f"{variant}encoder_attention", (n + 3, width), start, length, qkv, heads=np.int64(heads)
    )
    for s, m in zip(start, length, strict=True):
        q, k, v = np.split(qkv[s : s + m], 3, axis=1)
        np.testing.assert_allclose(got[s : s + m], attend(q, k, v), atol=1e-5)

    q = floats(b * j, width, seed=1)
    memory = [floats(n, 2 * width, seed=2 + i) for i in range(2)]  # of two encoder layers
    sentence = np.arange(b, dtype=np.int32)[::-1].copy()
    got = _call(
        f"{variant}cross_attention", (b * j, width), jnp.int32(b * j), sentence, start, length, q,
        *memory, heads=np.int64(heads), beams=np.int64(j),
    )  # fmt: skip
    for group, s in enumerate(sentence):
        words = slice(start[s], start[s] + length[s])
        k, v = np.split(np.concatenate([m[words] for m in memory]), 2, axis=1)
        rows = slice(group * j, group * j + j)
        np.testing.assert_allclose(got[rows], attend(q[rows], k, v), atol=1e-5)


def test_self_attention_follows_ancestors(variant):
    rows, time, width, heads, step = 4, 7, 24, 3, 5
    size = width // heads
    keys, values = floats(rows, time, width), floats(rows, time, width, seed=1)
    qkv = floats(rows, 3 * width, seed=2)
    ancestor = np.random.default_rng(0).integers(0, rows, (rows, time)).astype(np.int32)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, width), *[keys.shape] * 2)]
    y, new_keys, new_values = _calls(
        f"{variant}self_attention", shapes, jnp.int32(rows), jnp.int32(step), ancestor, qkv, keys,
        values, aliases={4: 1, 5: 2}, heads=np.int64(heads),
    )  # fmt: skip
    np.testing.assert_array_equal(new_keys[:, step], qkv[:, width : 2 * width])
    np.testing.assert_array_equal(new_values[:, step], qkv[:, 2 * width :])
    for r in range(rows):
        past = [*ancestor[r, :step], r]
        k = np.asarray(new_keys)[past, np.arange(step + 1)].reshape(-1, heads, size)
        v = np.asarray(new_values)[past, np.arange(step + 1)].reshape(-1, heads, size)
        q = qkv[r, :width].reshape(heads, size)
        p = softmax(np.einsum("hk,thk->ht", q, k) / np.sqrt(size))
        np.testing.assert_allclose(y[r], np.einsum("ht,thk->hk", p, v).ravel(), atol=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("words", [40, 700])
def test_top_words(variant, kind, words):
    rows, d, c = 6, 24, 10
    x, w = floats(rows, d), floats(d, words, seed=1)
    w[:, 12] = w[:, 11]  # a tie: the lower number comes first
    shapes = [((rows, c), jnp.float32), ((rows, c), jnp.int32), ((rows,), jnp.float32)]

    def run(barred, only):
        return _calls(
            f"{variant}top_words", [jax.ShapeDtypeStruct(*s) for s in shapes], jnp.int32(rows), x,
            *packed(w, kind), jnp.int32(barred), jnp.int32(only), words=np.int64(words),
            pad=np.int64(PAD_ID), eos=np.int64(EOS_ID),
        )  # fmt: skip

    logits = x @ w if kind == "fp32" else int8_product(x, w)
    best, word, log_z = map(np.asarray, run(barred=1, only=0))
    log_sum = np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(log_z, log_sum, atol=1e-5)
    allowed = logits.copy()
    allowed[:, [PAD_ID, EOS_ID]] = NEVER
    np.testing.assert_array_equal(word, np.argsort(-allowed, axis=1, kind="stable")[:, :c])
    np.testing.assert_allclose(best, np.take_along_axis(allowed, word, 1), atol=1e-5)
    best, word, _ = map(np.asarray, run(barred=0, only=1))
    assert (word[:, 0] == EOS_ID).all()
    np.testing.assert_allclose(best[:, 0], logits[:, EOS_ID], atol=1e-5)
    assert (best[:, 1:] < NEVER / 2).all()


@pytest.mark.parametrize("length", [20, 200])
def test_top_listed(variant, length):
    groups, j, d, words, c = 3, 2, 24, 300, 6
    rng = np.random.default_rng(0)
    x, table = floats(groups * j, d), floats(words, d, seed=1)
    listed = np.sort(np.stack([4 + rng.permutation(words - 4)[:length] for _ in range(4)])).astype(
        np.int32
    )
    listed[:, ::7] = -1
    listed[:, 1] = EOS_ID
    sentence = np.array([2, 0, 3], np.int32)  # of four; one has ended
    rows = groups * j
    shapes = [((rows, c), jnp.float32), ((rows, c), jnp.int32), ((rows,), jnp.float32)]

    def run(barred, only):
        return map(np.asarray, _calls(
            f"{variant}top_listed", [jax.ShapeDtypeStruct(*s) for s in shapes], jnp.int32(rows),
            sentence, x, table, listed, jnp.int32(barred), jnp.int32(only), words=np.int64(words),
            pad=np.int64(PAD_ID), eos=np.int64(EOS_ID), beams=np.int64(j),
        ))  # fmt: skip

    logits = np.full((rows, words), NEVER, np.float32)
    for r in range(rows):
        own = listed[sentence[r // j]]
        own = own[own >= 0]
        logits[r, own] = (x[r] @ table.T)[own]
    best, word, log_z = run(barred=1, only=0)
    log_sum = np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(log_z, log_sum, atol=1e-5)
    logits[:, [PAD_ID, EOS_ID]] = NEVER
    np.testing.assert_array_equal(word, np.argsort(-logits, axis=1, kind="stable")[:, :c])
    np.testing.assert_allclose(best, np.take_along_axis(logits, word, 1), atol=1e-5)
    best, word, _ = run(barred=0, only=1)
    assert (word[:, 0] == EOS_ID).all()
    assert (best[:, 1:] < NEVER / 2).all()


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_row_does_not_depend_on_others_or_on_threads(kind):
    x, w, b = floats(150, 64), floats(64, 96, seed=1), floats(96, seed=2)

    def run(rows):
        count = jnp.int32(len(rows))
        return np.asarray(_call("linear", (len(rows), 96), count, rows, *packed(w, kind), b))

    together = run(x)
    for i in (0, 7, 149):
        np.testing.assert_array_equal(run(x[i : i + 1])[0], together[i])
    with native.one_thread_a_call():
        np.testing.assert_array_equal(run(x), together)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_packing_and_back(kind):
    weights = {
        "embedding": floats(50, 24),
        "a.kernel": floats(24, 70, seed=1),
        "a.bias": floats(70, seed=2),
        "a.router.kernel": floats(24, 3, seed=3),
        "a.router.bias": floats(3, seed=4),
        "n.scale": floats(24, seed=5),
        "n.bias": floats(24, seed=6),
    }
    dense = quantize(weights) if kind == "int8" else weights
    back = unpack(pack(dense), 50)
    assert back.keys() == dense.keys()
    for name, w in dense.items():
        np.testing.assert_array_equal(back[name], w)
    if kind == "int8":
        restored = dense["a.kernel"] * dense["a.scale"]
        step = np.abs(weights["a.kernel"]).max(0) / 127
        assert (np.abs(restored - weights["a.kernel"]) <= step / 2 * 1.001).all()
        assert dense["a.router.kernel"].dtype == np.float32


def test_jobs_of_few_and_many_items_in_turns():
    """Whoever comes late to a job must not touch the next one."""
    shapes = [(5, 16, 40), (5, 16, 3000), (40, 16, 100), (5, 16, 64)]
    work = [(floats(r, k), floats(k, n, seed=1), floats(n, seed=2)) for r, k, n in shapes]
    packs = [packed(w) for _, w, _ in work]

    @jax.jit
    def run():
        return [
            _call("linear", (r, n), jnp.int32(r), x, *matrix, b)
            for _ in range(50)
            for (r, _, n), (x, _, b), matrix in zip(shapes, work, packs, strict=True)
        ]

    expected = [x @ w + b for x, w, b in work]
    for _ in range(20):
        for i, y in enumerate(run()):
            np.testing.assert_allclose(y, expected[i % len(work)], atol=2e-5)


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(native.Unavailable, match="no C compiler was found"):
        native.build(tmp_path)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(native.Unavailable, match="false could not compile"):
        native.build(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_compiled_once(tmp_path):
    first = native.build(tmp_path)
    made = first.stat().st_mtime_ns
    assert native.build(tmp_path) == first
    assert first.stat().st_mtime_ns == made


def test_threads_follow_nproc():
    code = "from automoe_jax.decoding import native; print(native.n_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"NPROC": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_works_alone():
    code = """
import os
from automoe_jax.decoding import native
native.n_threads()  # the workers are there
child = os.fork()
if not child:
    os._exit(native.n_threads())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
