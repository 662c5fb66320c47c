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
    token_batch,
)

from automoe_jax.decoding import beam, evolved_engine, native, native_engine, parts, xla_engine
from automoe_jax.decoding.weights import pack, prepare
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.model.extract import extract

SPACE = elastic_space()
ENGINES = {"xla": xla_engine, "native": native_engine, "evolved": evolved_engine}
needs_kernels = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_kernels), "xla", "evolved"])
def test_greedy_words_are_those_of_the_search(kind):
    """The program with the output layer takes the best word each time: a search with one beam."""
    space = evolved_space() if kind == "evolved" else SPACE
    subnet, hull = space.largest(), space.hull()
    params = random_evolved() if kind == "evolved" else extract(random_params(SPACE), subnet, hull)
    weights = prepare(params, subnet)
    weights = jax.tree.map(jax.numpy.asarray, pack(weights) if kind == "native" else weights)
    spec = ModelSpec(subnet, hull.encoder.embed_dim, hull.decoder.embed_dim, space.gate)
    source = jax.numpy.asarray(token_batch(np.random.default_rng(0))[0][:1])
    time_T = np.arange(6, dtype=np.int32)
    encoder, layers, output = parts.programs(ENGINES[kind], spec, VOCAB, 1)
    assert jax.tree.leaves(encoder(weights, source, time_T))
    _, total = layers(weights, source, time_T)
    assert np.isfinite(total)
    search = jax.jit(
        lambda *given: beam.search(ENGINES[kind], spec, VOCAB, 1, weights, source, *given)
    )

    for n in (3, 6):
        most = np.int32(n - 1)  # eos is barred before, and forced there
        found = search(np.arange(n, dtype=np.int32), most, most, np.float32(0))
        last, _ = output(weights, source, time_T[: n - 1])
        assert int(found.tokens_BJT[0, 0, n - 2]) == int(last[0, 0])
