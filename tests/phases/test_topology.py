"""Steps compiled for TPUs that are not here; most of it needs libtpu, the compiler."""

import dataclasses
import importlib.util
from collections import Counter

import jax
import pytest
from programs import launch, mistake
from tiny import tiny_config, tiny_flags

from automoe_jax.architecture import counts
from automoe_jax.data.plan import Bucket
from automoe_jax.ops import grouped_ffn
from automoe_jax.phases import topology as topologies
from automoe_jax.phases.weights import target
from automoe_jax.system.errors import UserError
from automoe_jax.system.hlo import Costs
from automoe_jax.training import sharding

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'"
)
BUCKET = Bucket(16, 10, 10)
REPORTED = ("4 chips x 2 micro-batch(es)", "memory of a chip", "bound by", "no program")


@pytest.mark.parametrize("name", ["", "v5e", "v9:2x2", "v5e:two", "v5e:2x", "gpu:8"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match=r"give a kind of TPU \(v4, v5e, v5p, v6e\)"):
        topologies.find(name)


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'automoe_jax\[tpu\]'"):
        topologies.find("v5e:2x4")


def test_bounds():
    """By hand, at the peaks of v5e: 197 TFLOP/s, 819 GB/s and 200 GB/s."""
    costs = Costs(197e9, 819e6, Counter({"all-reduce": 1e8, "all-gather": 1e8}))
    found = topologies.bounds(costs, topologies.chips.TPUS["v5e"])
    assert found == pytest.approx({"compute": 1e-3, "memory": 1e-3, "network": 1e-3})


@needs_libtpu
def test_slices_that_do_not_exist():
    with pytest.raises(UserError, match="libtpu cannot compile for it"):
        topologies.find("v5e:3x5")


def test_a_topology_is_compiled_for_not_trained_on(tmp_path):
    line = mistake("train", *tiny_flags(), f"--workdir={tmp_path}/run", "--topology=v5e:2x2")
    assert "--topology compiles for TPUs that are not here; it goes with --dry_run" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_libtpu
def test_the_program():
    done = launch(
        "train", *tiny_flags(), "--config.training.batches_per_step=8", "--dry_run",
        "--topology=v5e:2x2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    for words in REPORTED:
        assert any(words in line for line in lines), lines


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("here", marks=pytest.mark.slow),
        pytest.param("v5e:2x2", marks=needs_libtpu),
    ],
)
def compiled(request):
    """A step for TPUs; "here" for the CPU devices of this machine as if they were some."""
    config = tiny_config()
    training = dataclasses.replace(
        config.training, batches_per_step=8, compute_dtype="bfloat16", shard_optimizer=True
    )
    if request.param == "here":
        chip = topologies.chips.TPUS["v5e"]
        topology = topologies.Topology("here", tuple(jax.devices()), chip)
    else:
        topology = topologies.find(request.param)
    model = target(config, (72, 72))  # none as many as there are rows of experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LEAST", 64)
        if request.param == "here":  # the kernels of TPUs are interpreted, in many loops
            patch.setattr(grouped_ffn, "default_backend", lambda: "ragged_dot")
        found = topologies.compile_step(model, config, training, topology, BUCKET)
    return found, topology, config


def test_a_supernet_compiled_for_tpus(compiled):
    found, topology, config = compiled
    assert found.n_micro == 2
    largest = counts.count(config.space.largest(), 10).flops * BUCKET.rows * found.n_micro
    assert (found.costs.unknown_loops, found.costs.unknown_kernels) == (0, 0)
    # Forward and backward pass make three; in such a tiny model the optimizer, norms and the output
    # layer, which `counts` leaves out, are as much again. Measured: 6.9 and 7.2.
    assert 3 * largest < found.costs.flops < 9 * largest
    text = "\n".join(topologies.describe(found, topology, BUCKET, config.training))
    for words in REPORTED:
        assert words in text
    assert "all-gather" in found.costs.sent  # of the weights that each chip updates


def test_what_a_step_that_does_not_fit_is_told():
    """Only what a user can change: too large a kernel is another error."""
    topology = topologies.Topology("v5e:2x4", (), topologies.chips.TPUS["v5e"])
    told = topologies.too_large("RESOURCE_EXHAUSTED: Ran out of memory on HBM.\nmore", topology)
    assert told.startswith("the step does not fit a chip of v5e:2x4: Ran out of memory on HBM; ")
    for other in ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", "INTERNAL: HBM"):
        assert not topologies.too_large(other, topology)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2"])
def test_other_kinds_of_tpus(name):
    """The kernels' tiles fit their memories, too."""
    config, topology = tiny_config(), topologies.find(name)
    training = dataclasses.replace(config.training, batches_per_step=8, compute_dtype="bfloat16")
    model = target(config, (72, 72))
    found = topologies.compile_step(model, config, training, topology, BUCKET)
    assert not topologies.moved_experts(found.text, config)
    assert found.costs.flops > 0


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_no_chip_holds():
    """2 billion target tokens a chip: their ids alone take 8 GB, as do those of the sources."""
    config, topology = tiny_config(), topologies.find("v5e:2x2")
    training = dataclasses.replace(config.training, batches_per_step=4)
    pairs = Bucket(1 << 21, 1000, 1000)
    with pytest.raises(UserError, match=r"does not fit a chip of v5e:2x2: .*; these make it need"):
        topologies.compile_step(target(config, (72, 72)), config, training, topology, pairs)


def test_rows_of_experts_are_not_moved_one_by_one(compiled):
    found, _, config = compiled
    assert not topologies.moved_experts(found.text, config)


def test_rows_that_are_moved_one_by_one_are_found():
    """In the two forms that programs have had: all rows, and a matrix for each expert."""
    config = tiny_config()
    encoder = config.space.hull().encoder
    width, rows = encoder.embed_dim, sum(sum(layer.experts) for layer in encoder.layers)
    size = max(config.space.encoder_ffn_dims)
    text = f"""HloModule m

ENTRY %main (p: f32[{rows},{width}], i: s32[4,1], u: f32[4,{width}]) -> f32[{rows},{width}] {{
  %p = f32[{rows},{width}]{{1,0}} parameter(0)
  %i = s32[4,1]{{1,0}} parameter(1)
  %u = f32[4,{width}]{{1,0}} parameter(2)
  %g = f32[2,{size},{width}]{{2,1,0}} gather(%p, %i), offset_dims={{2}}
  ROOT %s = f32[{rows},{width}]{{1,0}} scatter(%p, %i, %u), to_apply=%add
}}
"""
    assert topologies.moved_experts(text, config) == {"gather": 1, "scatter": 1}
