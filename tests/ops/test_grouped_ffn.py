"""The grouped expert FFN against a naive loop, and its gradient against plain autodiff."""

import importlib.machinery
import sys
import types
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automoe_jax.ops import grouped_ffn as grouped_ffn_ops
from automoe_jax.ops import grouped_loop, grouped_ragged
from automoe_jax.ops.grouped_ffn import dense_reference, grouped_ffn
from automoe_jax.ops.grouping import ExpertWeights, Groups, LayerExperts

# The backends that run on a CPU.
HERE = ["loop", "pallas", "ragged_dot", pytest.param("blocked", marks=pytest.mark.slow)]


def weights_of(rng, slots, d):
    total = sum(slots)
    shapes = ((total, d), (total,), (total, d), (len(slots), d))
    return ExpertWeights(*(rng.normal(size=s).astype(np.float32) for s in shapes))


def naive(x, expert, w, slots, sizes):
    offsets = np.cumsum([0, *slots[:-1]])
    y = np.zeros_like(x)
    for i, e in enumerate(expert):
        if e >= len(sizes):
            continue
        if sizes[e] == 0:
            y[i] = x[i]
            continue
        rows = slice(offsets[e], offsets[e] + sizes[e])
        h = np.maximum(w.fc1_FD[rows] @ x[i] + w.fc1_bias_F[rows], 0)
        y[i] = h @ w.fc2_FD[rows] + w.fc2_bias_ED[e]
    return y


@st.composite
def cases(draw):
    """Sizes with and without zeros, slots of exact or equal size, all kinds of routing."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 5, 16, 33]), min_size=1, max_size=4))
    hypothesis.assume(any(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d = draw(st.sampled_from([1, 7, 40, 200])), 6
    one_size = draw(st.booleans())  # as in a supernet
    slots = [max(sizes) + draw(st.sampled_from([0, 3]))] * len(sizes) if one_size else sizes
    kind = draw(st.sampled_from(["mixed", "all to one", "some to none"]))
    expert = rng.integers(len(sizes), size=n)
    if kind == "all to one":
        expert[:] = expert[0]
    elif kind == "some to none":
        expert[rng.random(n) < 0.5] = len(sizes)
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x, expert.astype(np.int32), weights_of(rng, slots, d), tuple(slots), np.array(sizes)


def check(case, backend):
    """Value against a naive loop, gradients against plain autodiff within 1e-4 of the largest."""
    x, expert, weights, slots, sizes = case
    out = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def value_and_gradients(f, *extra):
        def objective(x, w):
            y = f(x, expert, w, sizes, slots, *extra)
            return jnp.sum(y * out), y

        return jax.jit(jax.grad(objective, (0, 1), has_aux=True))(x, weights)

    ours, y = value_and_gradients(grouped_ffn, backend)
    np.testing.assert_allclose(y, naive(x, expert, weights, slots, sizes), rtol=1e-4, atol=1e-4)
    reference, _ = value_and_gradients(dense_reference)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("backend", HERE)
@hypothesis.settings(max_examples=8)
@hypothesis.given(case=cases())
def test_forward_and_gradient(backend, case):
    check(case, backend)


def test_slices_and_blocks_of_full_size():
    """Slots that are whole slices, partly active; more rows than the largest block."""
    rng = np.random.default_rng(0)
    slots, sizes = (512,) * 3, np.array([300, 512, 256])
    assert grouped_loop.slice_columns(slots) == 512
    weights = jax.tree.map(lambda w: (0.1 * w).astype(np.float32), weights_of(rng, slots, 8))
    x = rng.normal(size=(1400, 8)).astype(np.float32)
    expert = np.where(rng.random(1400) < 0.8, 1, rng.integers(3, size=1400))
    check((x, expert, weights, slots, sizes), "loop")


@pytest.mark.parametrize("width", [128, 150, 256])
def test_a_layer_among_others(width):
    """The kernels of TPUs: several tiles of rows and columns; other layers' gradients stay.

    One expert, of size 0, is the next layer's.
    """
    rng = np.random.default_rng(0)
    sizes, before, after, d, slot = np.array([256, 0, 100, 256, 7]), 2, 2, 256, 256
    total = before + len(sizes) + after
    weights = weights_of(rng, (slot,) * total, d)
    weights = jax.tree.map(lambda w: (0.1 * w).astype(np.float32), weights)
    expert = rng.choice([0, 1, 2, 3, 4, 6], size=600, p=[0.4, 0.1, 0.2, 0.1, 0.1, 0.1])
    x, dy = (rng.normal(size=(600, width)).astype(np.float32) for _ in range(2))
    own = slice(before * slot, (before + len(sizes)) * slot)
    part = ExpertWeights(
        weights.fc1_FD[own, :width], weights.fc1_bias_F[own], weights.fc2_FD[own, :width],
        weights.fc2_bias_ED[before : before + len(sizes), :width],
    )  # fmt: skip
    offsets = (before + np.arange(len(sizes) + 1)) * slot
    experts = LayerExperts(
        jax.tree.map(jnp.asarray, weights), jnp.asarray(offsets), jnp.int32(before),
        jnp.asarray([*sizes, 0]), (0, 7, 100, slot), n_own=jnp.int32(len(sizes)),
    )  # fmt: skip

    def reference(x, part):
        return dense_reference(x, expert, part, sizes, (slot,) * len(sizes))

    y, pull = jax.vjp(reference, x, part)
    found, _ = grouped_ffn_ops.forward("pallas", x, jnp.asarray(expert), experts, None)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)
    dw = jax.tree.map(np.zeros_like, weights)
    dw.fc1_FD[: own.start], dw.fc2_FD[own.stop :] = 3, 5
    given = jax.tree.map(np.copy, dw)
    given.fc1_FD[own], given.fc2_FD[own] = np.nan, np.nan
    given = jax.tree.map(jnp.asarray, given)
    dx, dw_found = grouped_ffn_ops.backward(
        "pallas", x, jnp.asarray(expert), experts, None, dy, given
    )
    dx_expected, dw_expected = pull(dy)
    np.testing.assert_allclose(dx, dx_expected, rtol=1e-4, atol=1e-4)
    dw.fc1_FD[own, :width], dw.fc2_FD[own, :width] = dw_expected.fc1_FD, dw_expected.fc2_FD
    dw.fc1_bias_F[own] = dw_expected.fc1_bias_F
    dw.fc2_bias_ED[before : before + len(sizes), :width] = dw_expected.fc2_bias_ED
    for a, b in zip(dw_found, dw, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 8, 31, 32, 33, 63, 64, 127, 128, 511, 512, 5000])
def test_blocks_hold_every_row_once(n):
    """Experts of all counts, one of them of size 0; blocks of an expert lie one after the other."""
    rows = grouped_loop.block_rows(n)
    assert rows == sorted(rows)
    for counts in ([n, 0, 0, 0], [n // 3, n // 2, 1, n - n // 3 - n // 2 - 1], [0, 1, n - 1, 0]):
        count_E, sizes_E = np.maximum(counts, 0), np.array([4, 8, 0, 4])
        groups = Groups(order_A=None, expert_A=None, start_E=None, count_E=count_E)
        plans, stored_E = grouped_loop._plan(groups, sizes_E, rows)
        spans = [[] for _ in counts]
        for size, plan in zip(rows, plans, strict=True):
            n_blocks = np.diff([0, *plan.end_E.tolist()])
            for e, first in enumerate(plan.first_row_E.tolist()):
                spans[e] += [(first + i * size, first + (i + 1) * size) for i in range(n_blocks[e])]
        taken = [np.concatenate([np.arange(*s) for s in sorted(own)] or [[]]) for own in spans]
        for e, own in enumerate(taken):
            assert own.tolist() == list(range(len(own)))
            used = count_E[e] if sizes_E[e] else 0
            assert used <= len(own) < used + rows[0]
        assert stored_E.tolist() == [sum(map(len, taken[:e])) for e in range(len(counts))]


@pytest.mark.parametrize("backend", HERE)
def test_unused_weights_get_exactly_zero(backend):
    rng = np.random.default_rng(0)
    slots, sizes = (20, 20, 20), np.array([20, 11, 20])
    weights = weights_of(rng, slots, 4)
    x = rng.normal(size=(50, 4)).astype(np.float32)
    expert = np.full(50, 1)
    grads = jax.grad(lambda w: jnp.sum(grouped_ffn(x, expert, w, sizes, slots, backend)))(weights)
    used = np.zeros(60, bool)
    used[20:31] = True
    for array in (grads.fc1_FD, grads.fc1_bias_F, grads.fc2_FD):
        assert not np.asarray(array)[~used].any()
        assert np.asarray(array)[used].any()
    assert not np.asarray(grads.fc2_bias_ED)[[0, 2]].any()


@pytest.mark.parametrize("backend", HERE)
def test_bfloat16_adds_up_in_fp32(backend):
    """The sum of 4,096 equal terms is exact, which bf16 accumulation cannot reach."""
    n, d, f = 16, 8, 4096
    ones = ExpertWeights(
        jnp.ones((f, d)), jnp.zeros((f,)), jnp.full((f, d), 1.0), jnp.zeros((1, d))
    )
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), ones)
    x = jnp.full((n, d), 1 / 8, jnp.bfloat16)
    y = grouped_ffn(x, jnp.zeros(n, jnp.int32), weights, np.array([f]), (f,), backend)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), 4096)  # bf16 would stop at 256
    grads = jax.grad(
        lambda w: grouped_ffn(x, jnp.zeros(n, jnp.int32), w, np.array([f]), (f,), backend)
        .astype(jnp.float32).sum()
    )(weights)  # fmt: skip
    assert grads.fc1_FD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grads.fc2_FD.astype(np.float32), n)


@pytest.fixture
def tokamax(monkeypatch):
    """A library with the interface of tokamax and the limits of its kernels.

    They take operands of one dtype, and leave undefined what belongs to no group.
    """

    def ragged_dot(lhs, rhs, group_sizes, *, preferred_element_type):
        assert lhs.dtype == rhs.dtype
        y = jax.lax.ragged_dot(lhs, rhs, group_sizes, None, preferred_element_type)
        own = jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes)
        return jnp.where(own[:, None], y, jnp.nan)

    def ragged_dot_general(lhs, rhs, group_sizes, numbers, *, preferred_element_type):
        assert lhs.dtype == rhs.dtype
        y = jax.lax.ragged_dot_general(
            lhs, rhs, group_sizes, numbers, preferred_element_type=preferred_element_type
        )
        return jnp.where(group_sizes[:, None, None] > 0, y, jnp.nan)

    module: Any = types.ModuleType("tokamax")
    module.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    module.ragged_dot, module.ragged_dot_general = ragged_dot, ragged_dot_general
    monkeypatch.setitem(sys.modules, "tokamax", module)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokamax_is_called_as_its_kernels_allow(tokamax, dtype):
    """As the blocked products; an expert has no rows, and some rows no expert."""
    rng = np.random.default_rng(0)
    slots, sizes = (32,) * 4, np.array([20, 32, 7, 32])
    weights = jax.tree.map(lambda w: jnp.asarray(0.1 * w, dtype), weights_of(rng, slots, 16))
    x = jnp.asarray(rng.normal(size=(60, 16)), dtype)
    expert = rng.choice([0, 1, 2, 4], size=60)

    def gradients(backend):
        def objective(x, w):
            y = grouped_ffn(x, expert, w, sizes, slots, backend)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(objective, (0, 1)))(x, weights)

    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    found, expected = map(gradients, ("tokamax", "blocked"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        most = tolerance * np.abs(b).max().astype(np.float32)
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0, atol=most)


@pytest.mark.parametrize("transform", ["jit", "scan", "remat", "pmap"])
def test_under_transformations(transform):
    rng = np.random.default_rng(0)
    slots = (15, 15)
    weights = weights_of(rng, slots, 4)
    x, expert = rng.normal(size=(20, 4)).astype(np.float32), rng.integers(2, size=20)

    def f(x, sizes):
        return grouped_ffn(x, expert, weights, sizes, slots)

    sizes = np.array([15, 7])
    plain = f(x, sizes)
    if transform == "jit":
        got = jax.jit(f)(x, sizes)
    elif transform == "remat":
        got = jax.checkpoint(f)(x, sizes)
        jax.grad(lambda x: jax.checkpoint(f)(x, sizes).sum())(x)
    elif transform == "pmap":
        got = jax.pmap(f, axis_name="data")(np.stack([x] * 4), np.stack([sizes] * 4))[3]
    else:
        got = jax.lax.scan(lambda c, s: (c, f(c, s)), x, sizes[None])[1][0]
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-5)


def test_mistakes():
    rng = np.random.default_rng(0)
    x, expert, weights = np.ones((3, 4), np.float32), np.zeros(3, int), weights_of(rng, (5,), 4)
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: loop, pallas, ragged_dot"):
        grouped_ffn(x, expert, weights, np.array([5]), (5,), "cuda")
    with pytest.raises(ValueError, match=r"slots are \(6,\); weights have 5 rows"):
        grouped_ffn(x, expert, weights, np.array([5]), (6,))


@pytest.mark.parametrize("counts", [(100, 0, 37, 63), (0, 0, 0, 5), (300, 0, 0, 0), (0, 0, 0, 0)])
def test_the_kernel_of_a_tpu(counts):
    """Interpreted here; rows of several tiles and of no expert, columns of more than one tile."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(300, columns)).astype(np.float32) for columns in (900, 40))
    count = np.array(counts)
    found = grouped_ragged.contract_megablox(a, b, count, interpret=True)
    starts = np.cumsum(count) - count
    expected = [a[s : s + n].T @ b[s : s + n] for s, n in zip(starts, count, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
