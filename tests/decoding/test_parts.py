"""Parts of a translation as programs: each does what the whole search does, and no less."""

import jax
import numpy as np
import pytest
from conftest import (
    VOCAB,
    elastic_space,
    evolved_space,
    random_evolved,
    random_params,
    standalone_of,
    token_batch,
)

from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.decoding import evolved_engine, native, native_engine, parts, xla_engine
from automoe_jax.decoding.weights import pack, prepare
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.model.extract import extract

SPACE = elastic_space()
ENGINES = {"xla": xla_engine, "native": native_engine, "evolved": evolved_engine}
needs_kernels = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_kernels), "xla", "evolved"])
def test_the_last_words_are_those_of_the_model(kind):
    """After the drawn words of each hypothesis, which differ, as the teacher-forced model says."""
    space = evolved_space() if kind == "evolved" else SPACE
    subnet, hull = space.largest(), space.hull()
    params = random_evolved() if kind == "evolved" else extract(random_params(SPACE), subnet, hull)
    weights = prepare(params, subnet)
    weights = jax.tree.map(jax.numpy.asarray, pack(weights) if kind == "native" else weights)
    spec = ModelSpec(subnet, hull.encoder.embed_dim, hull.decoder.embed_dim, space.gate)
    source = jax.numpy.asarray(token_batch(np.random.default_rng(0))[0])
    beams, steps = 3, 6
    words = parts.words(VOCAB, len(source), beams, steps)
    assert len({tuple(w) for w in words.reshape(steps, -1).T}) == len(source) * beams
    encoder, layers, output = parts.programs(ENGINES[kind], spec, VOCAB, beams)
    (x_RD, _, total), memory = layers(weights, source, words)
    assert jax.tree.structure(encoder(weights, source, words)) == jax.tree.structure(memory)
    (again_RD, found, more), _ = output(weights, source, words)
    np.testing.assert_allclose(x_RD, again_RD, atol=1e-5 * np.abs(x_RD).max())
    assert np.isfinite(more - total)
    module = standalone_of(space, subnet)
    params = jax.tree.map(jax.numpy.asarray, params)
    for j in range(beams):
        logits_BTV = module.apply({"params": params}, source, words[:, :, j].T).logits_BTV
        best_B = np.argmax(np.where(np.arange(VOCAB) == PAD_ID, -np.inf, logits_BTV[:, -1]), -1)
        np.testing.assert_array_equal(found.word_BJC[:, j, 0], best_B)
