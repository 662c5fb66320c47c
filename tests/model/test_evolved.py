"""The Evolved Transformer: its size, and its cells against loops over positions written out."""

import dataclasses
from functools import partial

import evolved_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, evolved_space, random_evolved, standalone_of, token_batch

from automoe_jax.architecture import counts
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.stack_space import SpaceError
from automoe_jax.architecture.subnet import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Subnet,
    SubnetError,
    doubled_heads,
    from_json,
    to_json,
)
from automoe_jax.decoding.layout import Layout
from automoe_jax.decoding.weights import pack, params_of, prepare, quantize
from automoe_jax.model.evolved import (
    DecoderCell,
    EncoderCell,
    EvolvedTransformer,
    Memory,
    Separable,
)
from automoe_jax.published import subtransformer, supertransformer
from automoe_jax.system.errors import UserError
from automoe_jax.training.config import ModelConfig
from automoe_jax.training.target import TrainingTarget

SPACE = evolved_space()
ARCH = SPACE.largest()


def published(width: int, heads: int) -> Subnet:
    return Subnet(
        Encoder(width, (EncoderLayer(heads, (4 * width,)),) * 3),
        Decoder(width, (DecoderLayer(heads, heads, 1, (4 * width,)),) * 4),
        width,
        "evolved",
    )


@pytest.mark.parametrize(("width", "heads", "millions"), [(512, 8, 64.1), (1024, 16, 221.7)])
def test_as_large_as_published(width, heads, millions):
    """Table 3 of So et al. 2019, with the embeddings of 32,768 words."""
    words, arch = 32_768, published(width, heads)
    module = EvolvedTransformer(arch, (words, words), width, width)
    ids = jnp.full((1, 2), 4)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, ids))["params"]
    n = sum(x.size for x in jax.tree.leaves(params))
    assert n == counts.count(arch).params + words * width
    assert n / 1e6 == pytest.approx(millions, rel=0.02)


def test_flops_are_those_of_the_products():
    """XLA counts the same products; its count has the element-wise operations as well."""
    arch, n = published(64, 4), 30
    module = EvolvedTransformer(arch, (8, 8), 64, 64)
    ids = jnp.full((1, n), 4)
    params = module.init(jax.random.key(0), ids, ids)["params"]
    run = jax.jit(lambda p: module.apply({"params": p}, ids, ids).hidden_BTD)
    found = (run.lower(params).compile().cost_analysis() or {})["flops"]
    assert counts.count(arch, n).flops == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_separable_convolution(causal):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 4)).astype(np.float32)
    module = Separable(3, 5, causal=causal)
    params = module.init(jax.random.key(0), x)["params"]
    y = module.apply({"params": params}, x)
    kernel, linear = np.asarray(params["depthwise"]), params["map"]
    for t in range(6):
        first = t - 4 if causal else t - 2
        seen = [(i, t_i) for i, t_i in enumerate(range(first, first + 5)) if 0 <= t_i < 6]
        near = np.sum([x[:, t_i] * kernel[i] for i, t_i in seen], axis=0)
        expected = near @ linear["kernel"] + linear["bias"]
        np.testing.assert_allclose(y[:, t], expected, atol=1e-5)


def test_cells_are_those_of_the_paper():
    """Against loops over positions in NumPy, written from its figures and text."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, random_evolved())
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    encoder, decoder = ARCH.encoder.layers[0], ARCH.decoder.layers[0]
    d, e, n, s = ARCH.decoder.embed_dim, ARCH.encoder.embed_dim, 14, 12
    assert d != e
    x_SD, x_TD = rng.normal(size=(s, e)), rng.normal(size=(n, d))
    expected = evolved_reference.encoder_cell(wide["encoder"]["layer_0"], encoder.heads, x_SD)
    cell = EncoderCell(encoder, ARCH.qkv_dim, 0.0)
    own = {"params": params["encoder"]["layer_0"]}
    found = jax.jit(cell.apply)(
        own, x_SD[None].astype(np.float32), np.ones((1, s), bool), 0.0, None
    )
    np.testing.assert_allclose(found[0], expected, rtol=2e-5, atol=2e-5)

    heads = decoder.self_heads, doubled_heads(decoder.self_heads), decoder.cross_heads
    expected = evolved_reference.decoder_cell(wide["decoder"]["layer_0"], *heads, x_TD, x_SD)
    cell = DecoderCell(decoder, ARCH.qkv_dim, 0.0)
    own = {"params": params["decoder"]["layer_0"]}
    memory = Memory(x_SD[None].astype(np.float32), np.ones((1, s), bool))
    inputs = x_TD[None].astype(np.float32), np.tri(n, dtype=bool)[None], memory
    found = jax.jit(cell.apply)(own, *inputs, 0.0, None)
    np.testing.assert_allclose(found[0], expected, rtol=2e-5, atol=2e-5)


def on_device(params):
    return jax.tree.map(jnp.asarray, params)


def forced(module, params):
    return jax.jit(lambda src, tgt: module.apply({"params": params}, src, tgt).logits_BTV)


def test_the_decoder_does_not_see_what_follows():
    src, tgt = token_batch(np.random.default_rng(0))
    module, params = standalone_of(SPACE, ARCH), on_device(random_evolved())
    apply = forced(module, params)
    other = tgt.copy()  # JAX may still read an array that it was given
    other[:, 4] = (tgt[:, 4] + 1) % 40 + 4
    before, after = apply(src, tgt), apply(src, other)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.abs(before - after)[:2, 4:].max(axis=-1) > 0)


def test_padding_does_not_matter():
    src, tgt = token_batch(np.random.default_rng(1))
    src = np.where(src == PAD_ID, 5, src)
    module, params = standalone_of(SPACE, ARCH), on_device(random_evolved())
    apply = forced(module, params)
    plain = apply(src, tgt)
    for pads in ((0, 3), (2, 1)):
        padded = apply(np.pad(src, ((0, 0), pads), constant_values=PAD_ID), tgt)
        np.testing.assert_allclose(plain, padded, atol=2e-5 * np.abs(plain).max())


@pytest.mark.slow
def test_dropout_follows_its_key():
    src, tgt = token_batch(np.random.default_rng(1))
    module = EvolvedTransformer(ARCH, (VOCAB, VOCAB), 12, 8, dropout=0.3, attention_dropout=0.2)
    params = on_device(random_evolved())
    apply = jax.jit(lambda key: module.apply({"params": params}, src, tgt, key).logits_BTV)
    one, again, other = (apply(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.slow
def test_remat_and_bfloat16():
    src, tgt = token_batch(np.random.default_rng(3))
    space = dataclasses.replace(SPACE, encoder_depths=(1,), decoder_depths=(1,))
    params = on_device(random_evolved(scale=0.1, space=space))

    def loss(params, **fields):
        module = EvolvedTransformer(space.largest(), (VOCAB, VOCAB), 12, 8, **fields)
        hidden = module.apply({"params": params}, src, tgt).hidden_BTD
        return jnp.sum(hidden.astype(jnp.float32) ** 2), hidden

    def gradient(**fields):
        return jax.jit(jax.grad(partial(loss, **fields), has_aux=True))(params)

    (plain, hidden), (again, _) = gradient(), gradient(remat=True)
    for a, b in zip(*map(jax.tree.leaves, (plain, again)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max() + 1e-9)
    _, half = jax.jit(partial(loss, dtype="bfloat16"))(params)
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - hidden).max() < 0.05 * np.abs(hidden).max()


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_an_export_has_all_weights(quantization):
    params = random_evolved()
    weights = prepare(params, ARCH)
    packed = pack(quantize(weights) if quantization == "int8" else weights)
    assert not Layout(ARCH, (VOCAB, VOCAB), "all", quantization).mismatch(packed)
    back = params_of(weights, ARCH)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_json_keeps_the_cell():
    assert from_json(to_json(ARCH)) == ARCH
    assert to_json(ARCH)["cell"] == "evolved"
    assert "cell" not in to_json(SearchSpace().largest())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cell": "convolved"}, "cell is 'convolved'; allowed: transformer, evolved"),
        ({"encoder": Encoder(12, (EncoderLayer(2, (8, 8)),))}, "an evolved cell has one FFN"),
        ({"encoder": Encoder(11, (EncoderLayer(2, (8,)),))}, "embed_dim is 11.*an even one"),
        ({"decoder": Decoder(8, (DecoderLayer(2, 2, 2, (8,)),))}, "cross_span is 2; 1 in evolved"),
        ({"decoder": Decoder(8, (DecoderLayer(8, 2, 1, (8,)),)), "qkv_dim": 24}, "of 16 heads"),
    ],
)
def test_impossible_architectures(change, words):
    fields = {**vars(ARCH), **change}
    with pytest.raises(SubnetError, match=words):
        Subnet(**fields)


def test_published_files_hold_transformers_alone():
    with pytest.raises(SubnetError, match="write JSON"):
        subtransformer.dump(ARCH)
    with pytest.raises(SpaceError, match="holds Transformers"):
        supertransformer.dump(SPACE)


def test_an_evolved_space_holds_what_architectures_can_be():
    fields = dataclasses.asdict(SPACE)
    with pytest.raises(SpaceError, match="encoder_embed_dims has 11; evolved cells need even"):
        SearchSpace(**{**fields, "encoder_embed_dims": (11,)})
    with pytest.raises(SpaceError, match="attention of 16 heads, which do not divide 24"):
        SearchSpace(**{**fields, "qkv_dim": 24, "decoder_self_heads": (8,)})
    several = SearchSpace(**{**fields, "qkv_dim": 24, "decoder_self_heads": (4, 6)})
    several.validate(several.hull())


def test_spaces_say_what_evolved_cells_do_not_have():
    with pytest.raises(SpaceError, match=r"space\.encoder_experts is .*have \(1,\)"):
        SearchSpace(cell="evolved")
    with pytest.raises(SubnetError, match=r"the space has space\.cell=evolved"):
        SPACE.validate(Subnet(ARCH.encoder, ARCH.decoder, ARCH.qkv_dim))
    with pytest.raises(UserError, match="have no supernet: train an architecture"):
        TrainingTarget(SPACE, (VOCAB, VOCAB), ModelConfig())
