"""The chunked cross-entropy against the plain one on all logits, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import smoothed_cross_entropy

from automoe_jax.ops import cross_entropy
from automoe_jax.ops.cross_entropy import chunked_cross_entropy


@pytest.mark.parametrize("traced_for", ["cpu", "tpu"])
@pytest.mark.parametrize(
    ("n", "dim", "dims"),
    [(50, None, ()), (50, 8, (8, 12)), (50, 12, (8, 12)), (3, None, ()), (16, 8, (8,))],
)
def test_equals_the_plain_loss(monkeypatch, n, dim, dims, traced_for):
    monkeypatch.setattr(cross_entropy, "CHUNK_CPU", 16)
    monkeypatch.setattr(cross_entropy, "CHUNK_ACCELERATOR", 24)
    monkeypatch.setattr(cross_entropy, "platform", lambda: traced_for)
    rng = np.random.default_rng(n)
    h = jnp.asarray(rng.normal(size=(n, 12)), jnp.float32).at[:, dim or 12 :].set(0)
    table = jnp.asarray(rng.normal(size=(37, 14)), jnp.float32)
    target = jnp.asarray(rng.integers(4, 37, n)).at[n - n // 4 :].set(1)

    def ours(h, table, dim):
        return chunked_cross_entropy(h, table, target, target != 1, 0.1, dim, dims)

    def plain(h, table):
        sums = smoothed_cross_entropy((h @ table[:, :12].T)[None], target[None], 0.1)
        return sums.loss, sums.nll

    width = None if dim is None else jnp.int32(dim)
    np.testing.assert_allclose(ours(h, table, width), plain(h, table), rtol=1e-5)
    both = jax.jit(jax.value_and_grad(lambda *a: ours(*a)[0] * 0.5, (0, 1)))
    value, gradients = both(h, table, width)
    expected, theirs = jax.value_and_grad(lambda *a: plain(*a)[0] * 0.5, (0, 1))(h, table)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    theirs = theirs[0].at[:, dim or 12 :].set(0), theirs[1].at[:, dim or 12 :].set(0)
    for a, b in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


def test_nothing_of_tokens_times_words_is_kept(monkeypatch):
    """Residuals have the size of the inputs; logits exist for one chunk at a time."""
    monkeypatch.setattr(cross_entropy, "CHUNK_CPU", 64)
    n, d, v = 4096, 16, 4096
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (v, d))]
    target = jnp.zeros(n, jnp.int32)

    def loss(h, table):
        return chunked_cross_entropy(h, table, target, target == 0, 0.1)[0]

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * n * v / 8


def test_nll_has_no_gradient():
    h, table = jnp.ones((4, 3)), jnp.ones((5, 3))
    target = jnp.array([2, 3, 4, 2])
    gradient = jax.grad(lambda h: chunked_cross_entropy(h, table, target, target > 0, 0.1)[1])(h)
    assert not np.asarray(gradient).any()
