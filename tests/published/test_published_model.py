"""The model, its gradients and its updates against the published implementation.

The fixtures are tiny supernets run by the released code; SEMANTICS.md of the shared data describes
them. `superA` has experts, `superB` is dense (HAT).
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import supernet_of
from published_spaces import SPACES
from reference import smoothed_cross_entropy

from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.subnet import from_json
from automoe_jax.decoding import xla_engine as decoder
from automoe_jax.decoding.weights import prepare
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.model.extract import extract
from automoe_jax.model.transformer import Transformer
from automoe_jax.published import checkpoint, state_dict
from automoe_jax.training.config import OptimizerConfig
from automoe_jax.training.optimizer import rate
from automoe_jax.training.step import AXIS, TrainState, make_train_step

CASES = ["A01_largest", "A02_smallest", "A03_enc32_dec16", "A04_enc16_dec32", "A05_frac",
         "A06_frac_dec2", "A07_identity", "A09_top2", "B01_largest", "B02_smallest",
         "B03_mixed"]  # fmt: skip
WITH_GRADIENTS = [
    "A03_enc32_dec16", pytest.param("A09_top2", marks=pytest.mark.slow), "B03_mixed",
]  # fmt: skip
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def supernets(shared):
    """Name -> (space, params, jitted supernet)."""

    @functools.cache
    def get(name: str):
        space = SPACES[name]
        params, _ = state_dict.to_params(checkpoint.read(shared / f"fixtures/{name}.npz"), space)
        model = supernet_of(space)
        apply = jax.jit(lambda p, s, t, c: model.apply({"params": p}, s, t, c))
        return space, params, apply

    return get


class Case:
    """One fixture: the subnet, the JSON file, the arrays."""

    def __init__(self, shared, name: str):
        folder = shared / "fixtures"
        self.info = json.loads((folder / f"{name}.json").read_text())
        self.subnet = from_json(self.info["subnet"], 32)
        with np.load(folder / f"{name}.npz") as arrays:
            self.arrays = {key: arrays[key] for key in arrays}
        ids = ("src_tokens", "prev_output_tokens", "target")
        self.source, self.target_in, self.target = (self.arrays[k].astype(np.int32) for k in ids)

    def standalone(self):
        return Transformer(self.subnet, (64, 64), 32, 32)


def largest_difference(ours, theirs, where) -> float:
    return float(np.abs(np.asarray(ours) - theirs)[where].max())


@pytest.mark.parametrize("name", CASES)
def test_forward_pass(shared, supernets, name):
    """Logits, the output of every layer, router logits and losses, masked and stand-alone."""
    case = Case(shared, name)
    space, params, apply = supernets(case.info["supernet"])
    masked = apply(params, case.source, case.target_in, to_active(case.subnet, space.hull()))
    own = extract(params, case.subnet, space.hull())
    alone = jax.jit(case.standalone().apply)({"params": own}, case.source, case.target_in)
    real_source, real = case.source != 1, case.target != 1
    encoder, decoder_ = case.subnet.encoder, case.subnet.decoder
    layers = (*encoder.layers, *decoder_.layers)
    n_super = len(space.hull().encoder.layers)
    for output, decoder_starts in ((masked, n_super), (alone, len(encoder.layers))):
        assert largest_difference(output.logits_BTV, case.arrays["logits"], real) < TOLERANCE
        for i in range(len(encoder.layers)):
            # Theirs are (time, batch, width); ours may end with masked columns.
            ours = np.asarray(output.encoder_layers[i])[..., : encoder.embed_dim]
            theirs = case.arrays[f"encoder_layer_{i}"].swapaxes(0, 1)
            assert largest_difference(ours, theirs, real_source) < TOLERANCE
        for i in range(len(decoder_.layers)):
            ours = np.asarray(output.decoder_layers[i])[..., : decoder_.embed_dim]
            theirs = case.arrays[f"decoder_state_{i + 1}"].swapaxes(0, 1)
            assert largest_difference(ours, theirs, real) < TOLERANCE
        routers = [
            *output.router_logits[: len(encoder.layers)],
            *output.router_logits[decoder_starts : decoder_starts + len(decoder_.layers)],
        ]
        compared = 0
        for i, (ours, layer) in enumerate(zip(routers, layers, strict=True)):
            if len(layer.experts) == 1:
                continue  # theirs has a router without a choice
            where = real_source if i < len(encoder.layers) else real
            logits = np.asarray(ours).reshape(*where.shape, -1)
            theirs = case.arrays[f"router_logits_{i}"].reshape(*where.shape[::-1], -1)
            theirs = theirs.swapaxes(0, 1)
            n = len(layer.experts)
            assert largest_difference(logits[..., :n], theirs, where) < TOLERANCE
            assert np.all(logits[..., n:] == -np.inf)
            compared += 1
        assert compared == sum(len(layer.experts) > 1 for layer in layers)
        sums = smoothed_cross_entropy(output.logits_BTV, case.target, 0.1)
        assert float(sums.loss) == pytest.approx(case.info["loss_sum"], rel=1e-5)
        assert float(sums.nll) == pytest.approx(case.info["nll_sum"], rel=1e-5)
        assert float(sums.tokens) == case.info["sample_size"]


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding(shared, supernets, name):
    """Logits of the export's decoder, step by step."""
    case = Case(shared, name)
    space, params, _ = supernets(case.info["supernet"])
    own = extract(params, case.subnet, space.hull())
    weights = jax.tree.map(jnp.asarray, prepare(own, case.subnet))
    spec = ModelSpec(case.subnet, 32, 32)
    rows, time = case.target_in.shape
    encoded = decoder.start(weights, spec, jnp.asarray(case.source))
    step = jax.jit(functools.partial(decoder.decode, weights, spec))
    output = jax.jit(functools.partial(decoder.logits, weights))
    own = jnp.broadcast_to(jnp.arange(rows)[:, None, None], (rows, 1, time))
    caches, logits = decoder.empty_caches(spec, rows, time), []
    for t in range(time):
        ids = jnp.asarray(case.target_in[:, t : t + 1])
        never, n = jnp.bool_(False), jnp.int32(rows)
        request = decoder.Request(ids, jnp.int32(t), own[:, 0, 0], own, n, never, never, 0, 0)
        x_RD, caches = step(request, caches, encoded)
        logits.append(np.asarray(output(x_RD, request))[:, 0])
    ours = np.stack(logits, axis=1)
    difference = largest_difference(ours, case.arrays["incremental_logits"], case.target != 1)
    assert difference < TOLERANCE


@functools.cache
def gradient_of(model: Transformer):
    """The gradient of the summed loss; compiled once for all cases of a supernet."""

    def loss(params, source, target_in, target, choice):
        out = model.apply({"params": params}, source, target_in, choice)
        return smoothed_cross_entropy(out.logits_BTV, target, 0.1).loss

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients(shared, supernets, name):
    """Gradients of the summed loss, within 1e-4 of the largest of each array, and exact zeros."""
    case = Case(shared, name)
    space, params, _ = supernets(case.info["supernet"])
    hull, model = space.hull(), supernet_of(space)
    with np.load(shared / f"fixtures/{case.info['grad_file']}") as arrays:
        theirs = {key: arrays[key] for key in arrays}

    batch = (case.source, case.target_in, case.target)
    masked = gradient_of(model)(params, *batch, to_active(case.subnet, hull))
    masked = jax.tree.map(np.asarray, masked)
    ours = state_dict.from_params(masked, space)
    del ours[state_dict.TARGET]  # the same table as the source's
    for key, value in ours.items():
        if key in theirs:
            error = np.abs(value - theirs[key]).max()
            assert error <= 1e-4 * np.abs(theirs[key]).max(), key
        else:
            assert not value.any(), key
    assert not set(case.info["grad_none"]) & set(theirs)
    # They also have the routers of layers with one expert: gradients of zero.
    assert all(not theirs[key].any() for key in theirs.keys() - ours.keys())

    alone = gradient_of(case.standalone())(extract(params, case.subnet, hull), *batch, None)
    zeros = {key: np.zeros_like(value) for key, value in ours.items()}
    known = {key: theirs[key] for key in theirs.keys() & ours.keys()}
    published, _ = state_dict.to_params(zeros | known, space)
    expected = extract(published, case.subnet, hull)
    for path, value in jax.tree.leaves_with_path(alone):
        there = np.asarray(functools.reduce(lambda tree, k: tree[k.key], path, expected))
        tolerance = 1e-4 * np.abs(there).max() + 1e-6
        assert np.abs(value - there).max() <= tolerance, jax.tree_util.keystr(path)


def published_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam with eps added before the bias correction, as the published optimizer has it."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.int32(0), zeros, zeros

    def update(gradient, state, params=None):
        del params
        n, m, v = state
        t = n + 1
        m = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: config.b2 * v + (1 - config.b2) * g * g, v, gradient)
        size = rate(config)(n) * jnp.sqrt(1 - config.b2**t) / (1 - config.b1**t)
        return jax.tree.map(lambda m, v: -size * m / (jnp.sqrt(v) + config.eps), m, v), (t, m, v)

    return optax.GradientTransformation(init, update)


def test_six_updates(shared, supernets):
    """Six steps of our train step; only Adam's eps is placed as in the published optimizer."""
    folder = shared / "fixtures"
    info = json.loads((folder / "train6_zero_fill.json").read_text())
    space, params, _ = supernets("superA")
    config = OptimizerConfig(
        steps=info["max_update"],
        warmup_steps=info["warmup_updates"],
        initial_rate=info["warmup_init_lr"],
        peak_rate=info["max_lr"],
        final_rate=info["min_lr"],
        eps=info["eps"],
    )
    assert info["betas"] == f"({config.b1}, {config.b2})"
    tx = published_adam(config)
    step = make_train_step(supernet_of(space), tx, smoothing=0.1, load_balance_weight=0.0)
    step = jax.pmap(step, AXIS, in_axes=(0, 0, 0, None), devices=jax.devices()[:1])
    state = TrainState(jnp.int32(0), params, tx.init(params))
    state = jax.tree.map(lambda x: jnp.asarray(x)[None], state)
    with np.load(folder / "train6_batches.npz") as arrays:
        batches = {key: arrays[key].astype(np.int32) for key in arrays}
    assert len(info["steps"]) == 6
    for i, published in enumerate(info["steps"]):
        assert float(rate(config)(i)) == pytest.approx(published["lr"], rel=1e-6)
        subnet = from_json(published["subnet"], 32)
        choice = to_active(subnet, space.hull())
        seeds = published["batch_seeds"]
        assert len(seeds) == 2  # micro-batches
        choices = jax.tree.map(lambda x: np.stack([x, x])[None], choice)
        batch = {
            name: np.stack([batches[f"{key}_{seed}"] for seed in seeds])[None]
            for name, key in (("source", "src_tokens"), ("target", "target"))
        }
        state, metrics = step(state, batch, choices, jax.random.key(0))
        assert float(metrics.target_tokens[0]) == published["sample_size"]
        assert float(metrics.gradient_norm[0]) == pytest.approx(published["gnorm"], rel=1e-4)
    ours = state_dict.from_params(jax.tree.map(lambda x: np.asarray(x)[0], state.params), space)
    theirs = checkpoint.read(folder / "train6_zero_fill.npz")
    before = checkpoint.read(folder / "superA.npz")
    for key, value in theirs.items():
        error = np.abs(ours[key] - value)
        if key.endswith("in_proj_bias"):
            error[32:64] = 0  # keys: their true gradient is zero, the rest is rounding
        assert error.max() <= 1e-3 * np.abs(value).max(), key
        assert np.abs(value - before[key]).max() > 1e-3, key  # it was trained
