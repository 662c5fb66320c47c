"""The grouped expert FFN against a naive loop, and its gradient against plain autodiff."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automoe_jax.ops.grouped_ffn import ExpertWeights, dense_reference, grouped_ffn


def naive(x, expert, w, offsets, sizes):
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
    sizes = draw(st.lists(st.sampled_from([0, 1, 5, 16, 33]), min_size=1, max_size=4))
    hypothesis.assume(any(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d = draw(st.sampled_from([1, 7, 40, 150])), 6
    stacked = draw(st.booleans())  # a supernet's experts all have the largest size
    slots = [max(sizes) + draw(st.sampled_from([0, 3]))] * len(sizes) if stacked else sizes
    offsets = np.cumsum([0, *slots[:-1]])
    shapes = ((sum(slots), d), (sum(slots),), (sum(slots), d), (len(sizes), d))
    weights = ExpertWeights(*(rng.normal(size=s).astype(np.float32) for s in shapes))
    kind = draw(st.sampled_from(["mixed", "all to one", "some to none"]))
    expert = rng.integers(len(sizes), size=n)
    if kind == "all to one":
        expert[:] = expert[0]
    elif kind == "some to none":
        expert[rng.random(n) < 0.5] = len(sizes)
    x = rng.normal(size=(n, d)).astype(np.float32)
    columns = draw(st.sampled_from([1024, 8]))
    return x, expert.astype(np.int32), weights, offsets, np.array(sizes), columns


@hypothesis.settings(max_examples=10)
@hypothesis.given(cases())
def test_forward_and_gradient(case):
    x, expert, weights, offsets, sizes, columns = case
    y = grouped_ffn(x, expert, weights, offsets, sizes, columns)
    np.testing.assert_allclose(y, naive(x, expert, weights, offsets, sizes), rtol=1e-4, atol=1e-4)

    out = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def objective(f, *extra):
        return lambda x, w: jnp.sum(f(x, expert, w, offsets, sizes, *extra) * out)

    ours = jax.grad(objective(grouped_ffn, columns), (0, 1))(x, weights)
    reference = jax.grad(objective(dense_reference), (0, 1))(x, weights)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(np.abs(b).max(), 1e-3))


def test_unused_weights_get_exactly_zero():
    rng = np.random.default_rng(0)
    weights = ExpertWeights(
        *(rng.normal(size=s).astype(np.float32) for s in ((60, 4), (60,), (60, 4), (3, 4)))
    )
    x = rng.normal(size=(50, 4)).astype(np.float32)
    expert, offsets, sizes = np.full(50, 1), np.array([0, 20, 40]), np.array([20, 11, 20])
    grads = jax.grad(lambda w: jnp.sum(grouped_ffn(x, expert, w, offsets, sizes)))(weights)
    used = np.zeros(60, bool)
    used[20:31] = True
    for array in (grads.fc1_FD, grads.fc1_bias_F, grads.fc2_FD):
        assert not np.asarray(array)[~used].any()
        assert np.asarray(array)[used].any()
    assert not np.asarray(grads.fc2_bias_ED)[[0, 2]].any()


@pytest.mark.parametrize("transform", ["jit", "scan", "remat"])
def test_under_transformations(transform):
    rng = np.random.default_rng(0)
    shapes = ((30, 4), (30,), (30, 4), (2, 4))
    weights = ExpertWeights(*(rng.normal(size=s).astype(np.float32) for s in shapes))
    x, expert = rng.normal(size=(20, 4)).astype(np.float32), rng.integers(2, size=20)

    def f(x, sizes):
        return grouped_ffn(x, expert, weights, np.array([0, 15]), sizes)

    sizes = np.array([15, 7])
    plain = f(x, sizes)
    if transform == "jit":
        got = jax.jit(f)(x, sizes)
    elif transform == "remat":
        got = jax.checkpoint(f)(x, sizes)
        jax.grad(lambda x: jax.checkpoint(f)(x, sizes).sum())(x)
    else:
        got = jax.lax.scan(lambda c, s: (c, f(c, s)), x, sizes[None])[1][0]
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-5)
