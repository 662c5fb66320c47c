"""Counts against published figures and against the weights of the model."""

import json

import jax
import numpy as np
import pytest
from conftest import VOCAB, elastic_space, standalone_of

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Subnet,
    from_json,
)


def dense(width: int, ffn: int, heads: int) -> Subnet:
    return Subnet(
        Encoder(width, (EncoderLayer(heads, (ffn,)),) * 6),
        Decoder(width, (DecoderLayer(heads, heads, 1, (ffn,)),) * 6),
        width,
    )


def test_published_hat_table(shared):
    models = json.loads((shared / "published/hat_wmt14_ende.json").read_text())["models"]
    assert len(models) == 17
    for name, model in models.items():
        counts = complexity.count(
            from_json(model["subnet"], model["qkv_dim"]), model["sentence_length"]
        )
        published = model["published"]
        # To the printed digit.
        assert round(counts.params / 1e6, 2) == published["params_m"], name
        assert round(counts.flops / 1e9, 2) == published["gflops"], name
        assert counts.active_params == counts.params
        assert counts.sparsity == 0


@pytest.mark.parametrize(
    ("subnet", "params", "gflops"),
    [(dense(512, 2048, 8), 44.14, 2.677), (dense(1024, 4096, 16), 176.36, 10.639)],
    ids=["base", "big"],
)
def test_transformer_base_and_big(subnet, params, gflops):
    counts = complexity.count(subnet)
    assert round(counts.params / 1e6, 2) == params
    assert round(counts.flops / 1e9, 3) == gflops


def test_params_equal_the_weights_of_the_standalone_model():
    space = elastic_space(identity_experts=False)
    rng = np.random.default_rng(0)
    ids = np.full((1, 2), 4, np.int32)
    for _ in range(5):
        subnet = space.sample(rng)
        shapes = jax.eval_shape(
            lambda s=subnet: standalone_of(space, s).init(jax.random.key(0), ids, ids)
        )["params"]
        n = sum(x.size for x in jax.tree.leaves(shapes))
        width = max(subnet.encoder.embed_dim, subnet.decoder.embed_dim)
        assert complexity.count(subnet).params == n - VOCAB * width


def test_experts_by_hand():
    d, q, n = 4, 8, 30

    def subnet(*experts, top_k=1):
        return Subnet(
            Encoder(d, (EncoderLayer(2, tuple(experts), top_k),)),
            Decoder(d, (DecoderLayer(2, 2, 1, (6,)),)),
            q,
        )

    def ffn(f):
        return 2 * d * f + f + d if f else 0

    one = complexity.count(subnet(6))
    router = (d + 1) * 3
    three = complexity.count(subnet(6, 0, 10))
    assert three.params - one.params == ffn(10) + router
    assert three.active_params - one.params == pytest.approx(
        (ffn(6) + ffn(10)) / 3 - ffn(6) + router
    )
    assert three.active_params_min - one.params == router - ffn(6)
    assert three.active_params_max - one.params == router + ffn(10) - ffn(6)
    mean_macs = n * 2 * d * (16 / 3 - 6) + n * d * 3
    assert three.flops - one.flops == pytest.approx(2 * mean_macs)
    assert three.sparsity == pytest.approx(1 - three.active_params / three.params)
    two = complexity.count(subnet(6, 0, 10, top_k=2))
    assert two.active_params - three.active_params == pytest.approx((ffn(6) + ffn(10)) / 3)


def test_supernet_sparsity_counts_every_layer_at_all_experts():
    subnet = dense(512, 2048, 8)
    assert complexity.count(subnet).sparsity_supernet == 0
    counts = complexity.count(subnet, max_experts=2)
    ffn, router = 2 * 512 * 2048 + 2048 + 512, 513 * 2
    assert counts.sparsity_supernet == pytest.approx(
        1 - counts.params / (counts.params + 12 * (ffn + router))
    )
