"""One description of an export's arrays: packing produces exactly these."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import VOCAB, elastic_space, random_params

from automoe_jax.decoding.layout import COMMON, LISTED, Array, Layout
from automoe_jax.decoding.weights import pack, params_of, prepare, quantize, unpack
from automoe_jax.model.extract import extract

N_LISTED, N_COMMON = 4, 7


@pytest.mark.parametrize("sharing", ["all", "decoder", "none"])
def test_packed_weights_are_as_described(sharing):
    space = dataclasses.replace(elastic_space(), share_embeddings=sharing)
    params = random_params(space)
    rng = np.random.default_rng(0)
    lists = {
        LISTED: np.zeros((VOCAB, N_LISTED), np.int32),
        COMMON: np.zeros(N_COMMON, np.int32),
    }
    for _ in range(4):
        subnet = space.sample(rng)
        own = jax.tree.map(np.asarray, extract(params, subnet, space.hull()))
        for kind in ("none", "int8"):
            for shortlist in (0, N_LISTED):
                dense = prepare(own, subnet) | (lists if shortlist else {})
                packed = pack(quantize(dense) if kind == "int8" else dense)
                n_common = N_COMMON if shortlist else 0
                layout = Layout(subnet, (VOCAB, VOCAB), sharing, kind, shortlist, n_common)
                found = {name: Array(w.shape, w.dtype) for name, w in packed.items()}
                assert found == layout.arrays()
                assert layout.nbytes() == sum(w.nbytes for w in packed.values())
                assert layout.mismatch(packed) == ""


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("sharing", ["all", "decoder", "none"])
def test_the_weights_of_a_model_come_back(sharing, kind):
    """From a file's layout; of int8 what it stands for."""
    space = dataclasses.replace(elastic_space(), share_embeddings=sharing)
    rng = np.random.default_rng(0)
    for _ in range(4):
        subnet = space.sample(rng)
        own = extract(random_params(space), subnet, space.hull())
        own = jax.tree.map(lambda x: np.asarray(x, np.float32), own)
        dense = prepare(own, subnet)
        packed = pack(quantize(dense) if kind == "int8" else dense)
        back = params_of(unpack(packed, VOCAB), subnet)
        if sharing == "decoder" and kind == "int8":  # its output layer is another table now
            back.pop("output")
        assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, own)
        again = prepare(back, subnet)
        for name, w in dense.items():
            # Of int8, half a step of 1 / 127 of the largest in a column.
            step = np.abs(w).max() / 127 if kind == "int8" else 0
            np.testing.assert_allclose(again[name], w, atol=step * 0.51, rtol=0, err_msg=name)


def test_two_vocabularies():
    space = dataclasses.replace(elastic_space(), share_embeddings="none")
    subnet = space.sample(np.random.default_rng(0))
    arrays = Layout(subnet, (100, 40), "none").arrays()
    assert arrays["source_embedding"].shape == (100, subnet.encoder.embed_dim)
    assert arrays["target_embedding"].shape == (40, subnet.decoder.embed_dim)
    assert arrays["output"].shape == (2, subnet.decoder.embed_dim, 32)


def test_counting_needs_no_model():
    code = "import sys, automoe_jax.decoding.layout; print({'jax', 'flax'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
