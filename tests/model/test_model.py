"""The supernet: mask = slice, one compilation, no leak."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    VOCAB,
    elastic_space,
    layers_of,
    logits_of,
    random_params,
    standalone_of,
    supernet_of,
    token_batch,
)
from reference import smoothed_cross_entropy

from automoe_jax.architecture.active import to_active
from automoe_jax.model import layers, stacked
from automoe_jax.model.elastic_layer import Context, layer_context
from automoe_jax.model.experts import Routing, jittered, load_balance, z_loss
from automoe_jax.model.extract import extract, inherited, with_scales
from automoe_jax.model.layers import random_bits
from automoe_jax.model.scales import Scales, scales_of
from automoe_jax.model.seq2seq import position_table, positions

SPACES = {
    "everything elastic": elastic_space(),
    # 2 and 3 heads need a split into 6; the widths are odd, the encoder is wider.
    "odd sizes": elastic_space(
        qkv_dim=12,
        encoder_embed_dims=(7, 15),
        decoder_embed_dims=(9, 11),
        encoder_depths=(2, 3),
        encoder_heads=(2, 3),
        decoder_self_heads=(1, 6),
        cross_spans=(1, 2),
        encoder_ffn_dims=(3, 5),
        ffn_scale=0.4,
        attention_scale=0.7,
    ),
}
TABLES = {
    # Source, target and output apart; the pairs of `token_batch` fit the smaller vocabulary too.
    "three tables": elastic_space(
        encoder_depths=(2,), decoder_depths=(1, 2), cross_spans=(1, 2), share_embeddings="none"
    ),
    "two tables": elastic_space(
        encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,), share_embeddings="decoder"
    ),
}


@pytest.fixture(scope="module", params=sorted(SPACES))
def supernet(request):
    """The odd sizes with a program for each width, the others with one for all."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "odd sizes":
            patch.setattr(layers, "LEAST_SPARED", 0)
        yield make_supernet(SPACES[request.param])


@pytest.fixture(
    scope="module",
    params=["three tables", pytest.param("two tables", marks=pytest.mark.slow)],
)
def supernet_of_tables(request):
    return make_supernet(TABLES[request.param])


def make_supernet(space):
    model = supernet_of(space)
    params = random_params(space)
    apply = jax.jit(lambda p, s, t, c: model.apply({"params": p}, s, t, c))
    return space, params, apply


def router_margin(output, space, subnet, real_masks) -> float:
    """Smallest gap, over real tokens, between the last chosen expert and the next one."""
    gap = np.inf
    layers = (*subnet.encoder.layers, *subnet.decoder.layers)
    for logits, layer, real in zip(output.router_logits, layers, real_masks, strict=True):
        p = np.sort(np.asarray(jax.nn.softmax(logits, axis=-1)), axis=-1)[:, ::-1][real.reshape(-1)]
        if p.shape[1] > layer.top_k:
            gap = min(gap, (p[:, layer.top_k - 1] - p[:, layer.top_k]).min())
    return gap


def test_mask_equals_slice(supernet):
    """Invariant 1, padded rows included, over every dimension of the space."""
    check_mask_equals_slice(*supernet, 4)


def test_mask_equals_slice_with_tables_of_their_own(supernet_of_tables):
    check_mask_equals_slice(*supernet_of_tables, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"sharing": "own"},
        {"sharing": "means"},
        {"sharing": "common", "gate": "count"},
        pytest.param(  # a side without routers
            {"sharing": "common", "decoder_experts": (1,)}, marks=pytest.mark.slow
        ),
        {"gate": "normalised"},
    ],
    ids=str,
)
def test_mask_equals_slice_however_experts_are_shared(change):
    fields = {"encoder_experts": (1, 2, 4), "decoder_experts": (1, 3), **change}
    space = elastic_space(encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,), **fields)
    check_mask_equals_slice(*make_supernet(space), 4)


def check_mask_equals_slice(space, params, apply, n_subnets):
    rng = np.random.default_rng(0)
    hull = space.hull()
    compared = 0
    while compared < n_subnets:
        subnet = space.sample(rng)
        src, tgt = token_batch(rng)
        own = inherited(params, subnet, space)
        alone = jax.jit(standalone_of(space, subnet).apply)({"params": own}, src, tgt)
        real = [src != 1] * len(subnet.encoder.layers) + [tgt != 1] * len(subnet.decoder.layers)
        if router_margin(alone, space, subnet, real) < 1e-4:
            continue  # rounding may choose between such experts: draw again
        masked = apply(params, src, tgt, to_active(subnet, hull))
        scale = np.abs(alone.logits_BTV).max()
        np.testing.assert_allclose(masked.logits_BTV, alone.logits_BTV, atol=1e-5 * scale, rtol=0)
        np.testing.assert_allclose(masked.load_balance, alone.load_balance, rtol=1e-4)
        compared += 1


@pytest.mark.parametrize("width", [16, 12], ids=["one width", "two widths"])
def test_fresh_weights(width):
    """Xavier-uniform with the supernet's fans, Q, K and V as one matrix; routers +-D^-0.5."""
    space = elastic_space(
        qkv_dim=64, decoder_embed_dims=(width,), decoder_ffn_dims=(96,), share_embeddings="none",
        encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,),
    )  # fmt: skip
    hull = space.hull()
    ids = np.full((1, 2), 4, np.int32)
    init = jax.jit(supernet_of(space).init)
    params = init(jax.random.key(0), ids, ids, to_active(hull, hull))["params"]
    layer = jax.tree.map(np.asarray, layers_of(params, space)["decoder"]["layer_0"])

    def fans(*values):
        return np.sqrt(6 / sum(values))

    one = 3 if width == 16 else 1  # of cross-attention
    for array, bound in (
        (layer["self_attention"]["key"]["kernel"], fans(width, 3 * 64)),
        (layer["self_attention"]["out"]["kernel"], fans(width, 64)),
        (layer["cross_attention"]["query"]["kernel"], fans(width, one * 64)),
        (layer["cross_attention"]["value"]["kernel"], fans(16, one * 64)),
        (layer["experts"]["fc1"], fans(width, 96)),
        (layer["experts"]["fc2"], fans(width, 96)),
        (layer["experts"]["router"], width**-0.5),
    ):
        assert 0.85 * bound < np.abs(array).max() <= bound
        assert abs(array.mean()) < 0.25 * bound
    assert np.abs(layer["experts"]["router_bias"]).max() <= width**-0.5
    for name in ("fc1_bias", "fc2_bias"):
        assert not layer["experts"][name].any()
    assert not layer["cross_attention"]["value"]["bias"].any()
    for name, d in (("source_embedding", 16), ("target_embedding", width), ("output", width)):
        table = np.asarray(params[name]["table"])
        assert table[2:].std() == pytest.approx(d**-0.5, rel=0.1)
        assert table[1].any() == (name == "output")  # the pad row


def test_dropout_rate_is_scaled_to_the_width():
    """0.3 at the supernet's width, 0.3 * d / D at a subnet's, in both models."""
    space = elastic_space(encoder_depths=(1,), cross_spans=(1,))
    subnet, hull = space.smallest(), space.hull()
    alone = dataclasses.replace(standalone_of(space, subnet), dropout=0.3)
    assert alone.rates()[1] == pytest.approx(0.3 * 8 / 16)
    static = supernet_of(space, dropout=0.3).stack_static("encoder")
    active = to_active(subnet, hull).encoder
    context = Context(active, np.ones((1, 1, 1)), np.ones((1, 1)), None, None, None)
    for exact, x_BTD in ((False, np.zeros((1, 1, 16))), (True, np.zeros((1, 1, 8)))):
        own = layer_context(static, context, 0, x_BTD, None, exact=exact)
        assert float(own.rate) == pytest.approx(0.3 * 8 / 16)


def test_scales_can_be_part_of_the_weights():
    space = elastic_space(
        ffn_scale=0.4, attention_scale=0.7, encoder_top_k=(2,), encoder_experts=(3,)
    )
    params, rng = random_params(space), np.random.default_rng(2)
    subnet = space.sample(rng)
    while 0 not in subnet.encoder.layers[0].experts:  # identity experts have no scale
        subnet = space.sample(rng)
    own, (src, tgt) = extract(params, subnet, space.hull()), token_batch(rng)
    scaled = standalone_of(space, subnet)
    plain = dataclasses.replace(scaled, scales=Scales())
    expected = logits_of(scaled, own, src, tgt)
    apply = jax.jit(lambda params: plain.apply({"params": params}, src, tgt).logits_BTV)
    found = apply(with_scales(own, scales_of(space)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    unscaled = apply(own)
    assert np.abs(unscaled - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("backend", "least_spared"),
    [
        ("loop", None),
        ("loop", 0),
        pytest.param("pallas", None, marks=pytest.mark.slow),
        pytest.param("ragged_dot", None, marks=pytest.mark.slow),
        pytest.param("blocked", None, marks=pytest.mark.slow),
    ],
)
def test_loops_equal_masks(backend, least_spared, monkeypatch):
    """Loss and gradients of the loops over layers are those of masks alone, for every weight."""
    space = SPACES["everything elastic"]
    if least_spared is not None:
        monkeypatch.setattr(layers, "LEAST_SPARED", least_spared)
    if backend != "loop":
        space = elastic_space(
            encoder_embed_dims=(16,), decoder_embed_dims=(8,), encoder_depths=(2,),
            decoder_depths=(1, 2), cross_spans=(1,), encoder_experts=(1, 2, 3),
            encoder_placement=(1, 3),
        )  # fmt: skip
    hull, params = space.hull(), jax.tree.map(jnp.asarray, random_params(space))
    models = (
        dataclasses.replace(supernet_of(space), backend=backend),
        supernet_of(space, masked=True),
    )

    def gradient(model):
        def loss(p, src, tgt, active):
            out = model.apply({"params": p}, src, tgt, active)
            sums = smoothed_cross_entropy(out.logits_BTV, tgt, 0.1)
            weight_L = 1.0 + jnp.arange(len(out.router_losses.z))  # of each layer its own
            balance, z = (jnp.dot(weight_L, losses_L) for losses_L in out.router_losses)
            return sums.loss + balance + 0.1 * z

        return jax.jit(jax.value_and_grad(loss))

    loops, masks = (gradient(model) for model in models)
    rng = np.random.default_rng(7)
    for _ in range(4):
        src, tgt = token_batch(rng)
        active = to_active(space.sample(rng), hull)
        ours, theirs = (f(params, src, tgt, active) for f in (loops, masks))
        assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
        for (path, a), b in zip(
            jax.tree.leaves_with_path(ours[1]), jax.tree.leaves(theirs[1]), strict=True
        ):
            # Of a key's bias the true gradient is zero: what is left is rounding.
            scale = np.abs(b).max() + (1e-2 if "key" in jax.tree_util.keystr(path) else 1e-6)
            np.testing.assert_allclose(
                a, b, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path)
            )


def test_stacking_is_undone():
    """Also where layers have different experts and some have no router."""
    space = elastic_space(encoder_depths=(3,), encoder_experts=(1, 2, 3),
                          encoder_placement=(1, 3, 2), cross_spans=(1,))  # fmt: skip
    params = random_params(space)
    experts = [layer.experts for layer in space.hull().encoder.layers]
    layers = layers_of(params, space)["encoder"]
    assert "router" not in layers["layer_0"]["experts"]
    assert layers["layer_2"]["experts"]["router"].shape[-1] == 2
    again = stacked.join(list(layers.values()), experts)
    for name in stacked.FLAT:
        np.testing.assert_array_equal(
            again["experts"][name], params["encoder"]["layers"]["experts"][name]
        )
    router, there = again["experts"]["router"], params["encoder"]["layers"]["experts"]["router"]
    assert not router[0].any()
    np.testing.assert_array_equal(router[1], there[1])


def test_beyond_the_width_is_zero(supernet):
    space, params, apply = supernet
    subnet = dataclasses.replace(space.smallest())
    src, tgt = token_batch(np.random.default_rng(0))
    output = apply(params, src, tgt, to_active(subnet, space.hull()))
    assert not np.asarray(output.encoder_layers[-1])[..., subnet.encoder.embed_dim :].any()
    assert not np.asarray(output.decoder_layers[-1])[..., subnet.decoder.embed_dim :].any()


def test_no_leak(supernet):
    """Invariant 3: weights outside the sampled subnet get a gradient of exactly zero."""
    check_no_leak(*supernet)


def test_no_leak_with_tables_of_their_own(supernet_of_tables):
    check_no_leak(*supernet_of_tables)


def check_no_leak(space, params, _):
    model, hull = supernet_of(space), space.hull()

    @jax.jit
    def gradient(params, src, tgt, active):
        def loss(p):
            out = model.apply({"params": p}, src, tgt, active)
            return smoothed_cross_entropy(out.logits_BTV, tgt, 0.1).loss + out.load_balance

        return jax.grad(loss)(params)

    rng = np.random.default_rng(1)
    for subnet in [space.smallest(), *(space.sample(rng) for _ in range(4))]:
        src, tgt = token_batch(rng)
        grads = gradient(params, src, tgt, to_active(subnet, hull))
        # What the subnet uses, as ones among zeros.
        ones = jax.tree.map(np.ones_like, params)
        whole = jax.tree.map(np.array, layers_of(ones, space))
        used = spread(extract(ones, subnet, hull), whole, subnet, hull)
        grads = layers_of(grads, space)
        for (path, g), u in zip(
            jax.tree.leaves_with_path(grads), jax.tree.leaves(used), strict=True
        ):
            assert not np.asarray(g)[u == 0].any(), jax.tree_util.keystr(path)
        tables = [name for name in grads if "table" in grads[name]]
        n_tables = {"all": 1, "decoder": 2, "none": 3}[space.share_embeddings]
        assert len(tables) == n_tables
        for name in tables:
            assert np.abs(np.asarray(grads[name]["table"])).max() > 0


def spread(part, whole, subnet, hull):
    """Ones where a supernet's array holds a weight of the extracted subnet, zeros elsewhere."""
    out = jax.tree.map(np.zeros_like, whole)
    for name in part.keys() - {"encoder", "decoder"}:
        out[name]["table"][:, : part[name]["table"].shape[1]] = 1
    for side in ("encoder", "decoder"):
        layers = getattr(subnet, side).layers
        for i, layer in enumerate(layers):
            there, here = out[side][f"layer_{i}"], part[side][f"layer_{i}"]
            bound = getattr(hull, side).layers[i].experts
            for name, value in here.items():
                if name != "experts":
                    jax.tree.map(
                        lambda o, v: o.__setitem__(tuple(map(slice, v.shape)), 1),
                        there[name],
                        value,
                    )
            d = here["experts_norm"]["scale"].shape[0]
            for e, size in enumerate(layer.experts):
                rows = slice(sum(bound[:e]), sum(bound[:e]) + size)
                there["experts"]["fc1"][rows, :d] = 1
                there["experts"]["fc1_bias"][rows] = 1
                there["experts"]["fc2"][rows, :d] = 1
                there["experts"]["fc2_bias"][e, :d] = size > 0
            if len(layer.experts) > 1:
                there["experts"]["router"][:d, : len(layer.experts)] = 1
                there["experts"]["router_bias"][: len(layer.experts)] = 1
    return out


def test_padding_changes_nothing(supernet):
    """Invariant 3: more padding on either side leaves real positions as they were."""
    space, params, apply = supernet
    rng = np.random.default_rng(2)
    src, tgt = token_batch(rng)
    short_src, short_tgt = src[2:, :6], tgt[:1, :5]
    tgt_padded = np.full((3, 7), 1, np.int32)
    tgt_padded[0, :5] = short_tgt[0]
    for left in (0, 3):
        src_padded = np.full((3, 9), 1, np.int32)
        src_padded[0, left : left + 6] = short_src[0]
        for subnet in (space.largest(), space.sample(rng)):
            active = to_active(subnet, space.hull())
            alone = apply(params, short_src, short_tgt, active).logits_BTV
            padded = apply(params, src_padded, tgt_padded, active).logits_BTV
            np.testing.assert_allclose(
                padded[0, :5], alone[0], atol=1e-5 * np.abs(alone).max(), rtol=0
            )


def test_future_changes_nothing(supernet):
    space, params, apply = supernet
    rng = np.random.default_rng(3)
    src, tgt = token_batch(rng)
    other = tgt.copy()
    other[:, 4:] = rng.integers(4, VOCAB, other[:, 4:].shape)
    active = to_active(space.largest(), space.hull())
    a, b = (np.asarray(apply(params, src, t, active).logits_BTV) for t in (tgt, other))
    np.testing.assert_allclose(a[:2, :4], b[:2, :4], atol=1e-5 * np.abs(a).max())
    assert np.abs(a[:2, 4:] - b[:2, 4:]).max() > 1e-3


def test_one_compilation_for_a_thousand_subnets(supernet, compilations):
    """Invariant 2, for the forward pass."""
    space, params, apply = supernet
    rng = np.random.default_rng(4)
    src, tgt = token_batch(rng)
    hull = space.hull()
    params = jax.tree.map(jnp.asarray, params)
    jax.block_until_ready(apply(params, src, tgt, to_active(space.largest(), hull)))
    before = compilations()
    for _ in range(1000):
        out = apply(params, src, tgt, to_active(space.sample(rng), hull))
    jax.block_until_ready(out)
    assert compilations() == before


def test_dropout_follows_the_key_and_the_width():
    space = elastic_space(encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,))
    model, params, hull = supernet_of(space, dropout=0.5), random_params(space), space.hull()
    src, tgt = token_batch(np.random.default_rng(0))
    active = to_active(space.largest(), hull)
    apply = jax.jit(lambda c, k: model.apply({"params": params}, src, tgt, c, k).logits_BTV)
    a, b, c = (np.asarray(apply(active, jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-2
    without = logits_of(model, params, src, tgt, active)
    assert np.abs(a - without).max() > 1e-2


def test_z_loss_by_hand():
    """Mean of squared log-sums over real tokens and active experts; none without a router."""
    real = np.array([True, True, False])
    logits = np.log([[1, 3, 0], [2, 2, 0], [50, 50, 0]], where=[True, True, False],
                    out=np.full((3, 3), -np.inf))  # fmt: skip
    routing = Routing(jnp.asarray(logits), jnp.zeros((3, 1), int), jnp.ones((3, 1)))
    assert float(z_loss(routing, real)) == pytest.approx(np.log(4) ** 2, rel=1e-6)
    alone = routing._replace(logits_NE=jnp.asarray([[5.0, -jnp.inf]] * 3))
    assert float(z_loss(alone, real)) == 0


def test_jitter_is_uniform_noise_on_the_router_input():
    bits = random_bits(jax.random.key(0), [(500, 40)])[0]
    noise = np.asarray(jittered(jnp.full((500, 40), 2.0), 0.1, bits)) / 2
    assert 0.9 <= noise.min() < 0.9001
    assert 1.0999 < noise.max() < 1.1
    assert noise.mean() == pytest.approx(1, abs=0.002)
    assert noise.std() == pytest.approx(0.2 / 12**0.5, rel=0.02)


def test_jitter_moves_routers_alone():
    """With a key, and without dropout, jitter changes routing, in both models alike in kind."""
    space = elastic_space(encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,))
    subnet, hull, params = space.largest(), space.hull(), random_params(space)
    src, tgt = token_batch(np.random.default_rng(0))
    models = {
        "supernet": (dataclasses.replace(supernet_of(space), router_jitter=0.2), params,
                     (to_active(subnet, hull),)),
        "alone": (dataclasses.replace(standalone_of(space, subnet), router_jitter=0.2),
                  extract(params, subnet, hull), ()),
    }  # fmt: skip
    for model, own, more in models.values():
        apply = jax.jit(model.apply)
        still, again, moved = (
            apply({"params": own}, src, tgt, *more, key) for key in (None, None, jax.random.key(1))
        )
        np.testing.assert_array_equal(still.router_logits[0], again.router_logits[0])
        gap = np.abs(np.asarray(moved.router_logits[0] - still.router_logits[0]))
        real = np.asarray(src != 1).reshape(-1)
        assert gap[real].max() > 1e-3
        # Noise of at most a fifth on each input moves a logit by at most a fifth of their sizes.
        assert gap[real].max() < 0.2 * 16 * 3 * 0.3 * 5
    # Without routers nothing moves: experts get no noise.
    dense = elastic_space(
        encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,), encoder_experts=(1,),
        decoder_experts=(1,), encoder_top_k=(1,), decoder_top_k=(1,),
    )  # fmt: skip
    own = extract(random_params(dense), dense.largest(), dense.hull())
    model = dataclasses.replace(standalone_of(dense, dense.largest()), router_jitter=0.2)
    still, moved = (
        jax.jit(model.apply)({"params": own}, src, tgt, key) for key in (None, jax.random.key(1))
    )
    np.testing.assert_array_equal(still.hidden_BTD, moved.hidden_BTD)


def test_load_balance_by_hand():
    logits = np.log(np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], np.float32))
    logits = np.concatenate([logits, np.full((4, 1), -np.inf, np.float32)], axis=1)
    routing = Routing(jnp.asarray(logits), jnp.asarray([[0], [0], [1], [3]]), jnp.ones((4, 1)))
    real = jnp.asarray([True, True, True, False])
    # f = (2/3, 1/3), P = (1.5/3, 1.5/3), two active experts
    assert float(load_balance(routing, real)) == pytest.approx(2 * (2 / 3 * 0.5 + 1 / 3 * 0.5))


def test_positions_count_real_tokens_from_two():
    ids = np.array([[1, 1, 5, 6], [7, 8, 9, 1]])
    np.testing.assert_array_equal(positions(jnp.asarray(ids)), [[1, 1, 2, 3], [2, 3, 4, 1]])
    table = position_table(4, 7)
    assert table.shape == (6, 7)
    assert not table[1].any()
    assert not table[:, 6].any()  # odd width: the last column stays zero
    assert table[3, 0] == pytest.approx(np.sin(3.0))
    assert table[3, 5] == pytest.approx(np.cos(3.0 * 1e-4))


def test_random_bits_are_fair_and_follow_the_key():
    """Means, and correlations between neighbours, halves and keys."""
    n = 200_000
    a, b = random_bits(jax.random.key(0), [(n,), (n + 1,)])
    (other,) = random_bits(jax.random.key(1), [(n,)])
    a, b, other = (np.asarray(x).astype(np.float64) / 2**16 for x in (a, b, other))
    for x in (a, b, other):
        assert abs(x.mean() - 0.5) < 4 * 0.29 / np.sqrt(n)
        for rate in (0.1, 0.3, 0.9):
            assert abs((x < rate).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    pairs = [
        (a[1:], a[:-1]),
        (a[: n // 2], a[n // 2 :]),
        (a, b[:n]),
        (a, other),
        (a[512:], a[:-512]),
    ]
    for x, y in pairs:
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(len(x))
    # Every one of 16 ranges as often as chance has it.
    counts = np.bincount((a * 16).astype(int), minlength=16)
    assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 45  # chi-squared, 15 degrees: p < 1e-4
