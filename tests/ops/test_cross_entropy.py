"""The chunked cross-entropy against the plain one on all logits, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import smoothed_cross_entropy

from automoe_jax.ops import cross_entropy
from automoe_jax.ops.cross_entropy import Teacher, chunked_cross_entropy


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


@pytest.mark.parametrize("own_table", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_teacher_adds_its_softmax_as_targets(monkeypatch, weight, temperature, own_table):
    monkeypatch.setattr(cross_entropy, "CHUNK_CPU", 16)
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=s) for s in ((40, 12), (37, 12), (40, 10), (37, 10))]
    h, table, taught, other = (jnp.asarray(x, jnp.float32) for x in arrays)
    target = jnp.asarray(rng.integers(4, 37, 40)).at[30:].set(1)
    theirs = other if own_table else None

    @jax.jit
    def ours(h, table, weight):
        teacher = Teacher(taught, weight, temperature, theirs)
        return chunked_cross_entropy(h, table, target, target != 1, 0.1, teacher=teacher)[0]

    def plain(h, table):
        hard = smoothed_cross_entropy((h @ table.T)[None], target[None], 0.1).loss
        given = other if own_table else jax.lax.stop_gradient(table[:, :10])
        soft_NV = jax.nn.softmax(taught @ given.T / temperature)
        log_p_NV = jax.nn.log_softmax(h @ table.T / temperature)
        soft = -jnp.sum(soft_NV * log_p_NV * (target != 1)[:, None])
        return (1 - weight) * hard + weight * temperature**2 * soft

    value, gradients = jax.value_and_grad(ours, (0, 1))(h, table, weight)
    expected, wanted = jax.value_and_grad(plain, (0, 1))(h, table)
    assert float(ours(h, table, weight)) == pytest.approx(float(expected), rel=1e-5)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
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
