"""What a training step will need on TPUs that are not here, compiled ahead of time for them."""

import contextlib
import importlib.util
import io
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies as slices
from jax.sharding import Mesh

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.config import RunConfig
from automoe_jax.data.batches import Share
from automoe_jax.data.plan import Bucket
from automoe_jax.ops.grouped_ffn import REST
from automoe_jax.system import chips, hlo, hlo_text
from automoe_jax.system.chips import Chip
from automoe_jax.system.errors import UserError
from automoe_jax.system.hlo import Costs
from automoe_jax.system.platforms import traced_for
from automoe_jax.training import parallel
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.steps import (
    abstract_arguments,
    check_expert_parallel,
    per_device_step,
)
from automoe_jax.training.target import TrainingTarget

_LAYERS = re.compile(r"/(encoder|decoder)_layers_of_width_(\d+)/while$")
_CHUNKS = re.compile(r"\b(\d+)_chunks_of_width_(\d+)\)?/while$")


class Topology(NamedTuple):
    """TPUs to compile for."""

    name: str  # as "v5e:2x4"
    devices: tuple[Any, ...]
    chip: Chip


class Compiled(NamedTuple):
    """A step that was compiled for a topology."""

    costs: Costs  # of one update of the largest subnet, on one chip
    memory: Any  # XLA's `CompiledMemoryStats`, of one chip
    seconds: float  # to compile
    text: str
    n_micro: int


def find(name: str) -> Topology:
    """The TPUs of a name that libtpu takes; `UserError` if it takes none such, or is missing."""
    kind, _, shape = name.partition(":")
    if kind not in chips.TPUS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"--topology is {name!r}; give a kind of TPU ({', '.join(chips.TPUS)}) and the shape "
            "of a slice, as v5e:2x4 or v5p:2x2x1"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs libtpu, the compiler for TPUs (no TPU is needed): "
            "pip install 'automoe_jax[tpu]'"
        )
    # It would look for a TPU of this machine, and allow one process to have it.
    for name_of in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name_of, "1")
    try:
        with _quiet():
            described = slices.get_topology_desc(name, platform="tpu")
    except Exception as e:  # of libtpu's own kinds
        raise UserError(f"--topology {name}: libtpu cannot compile for it: {e}") from None
    return Topology(name, tuple(described.devices), chips.TPUS[kind])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what libtpu writes about the missing machine from standard error."""
    with contextlib.redirect_stderr(io.StringIO()):
        kept = os.dup(2)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def compile_step(
    model: TrainingTarget, config: RunConfig, training: TrainingConfig, topology: Topology,
    bucket: Bucket,
) -> Compiled:  # fmt: skip
    """Compiles the step of a model at a batch shape; costs are those of the largest subnet.

    `UserError` where a chip has not enough memory for it.
    """
    n_devices = len(topology.devices)
    check_expert_parallel(training, n_devices)
    n_micro = max(training.batches_per_step // n_devices, 1)
    mesh = Mesh(np.array(topology.devices), (parallel.AXIS,))
    largest = model.subnet or model.space.largest()
    drawn = None
    if model.subnet is None:
        drawn = [[largest] * (n_micro * config.sampling.subnets(config.sampling.largest_first))]
        drawn *= n_devices
    with traced_for("tpu"):
        step = per_device_step(model, training, config.sampling)
        mapped = parallel.map_train_step_over(step, mesh)
        share = Share(0, n_devices, n_devices)
        arguments = abstract_arguments(model, training, config.seed, bucket, drawn, share, n_micro)
        start = time.monotonic()
        lowered = mapped.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if refused := too_large(str(e), topology):
                raise UserError(refused) from None
            raise
    seconds = time.monotonic() - start
    text = compiled.as_text()
    costs = hlo.costs(text, _trips(largest))
    return Compiled(costs, compiled.memory_analysis(), seconds, text, n_micro)


def too_large(error: str, topology: Topology) -> str:
    """What to tell a user if the compiler's error is that a step needs more memory than a chip has.

    Else "": a kernel that needs more of another memory, for one, is no user's mistake.
    """
    kind, _, words = error.partition("\n")[0].partition(": ")
    if kind != "RESOURCE_EXHAUSTED" or "hbm" not in words.lower():
        return ""
    return (
        f"the step does not fit a chip of {topology.name}: {words.rstrip('.')}; these make it need "
        "less, where they are not set yet: training.compute_dtype=bfloat16, "
        "training.shard_optimizer=True, training.remat=layer, a smaller training.tokens_per_batch, "
        "training.expert_parallel with sampling.unit=update (docs/pods.md)"
    )


def moved_experts(text: str, config: RunConfig) -> Counter[str]:
    """Gathers and scatters of rows of experts' weights in a program, by kind: there should be none.

    They read and write row by row what lies in one piece.
    """
    space = config.space
    widths = {*space.encoder_embed_dims, *space.decoder_embed_dims}
    sizes = {*space.encoder_ffn_dims, *space.decoder_ffn_dims}
    # Rows of all experts that a chip has.
    totals = {
        sum(sum(layer.experts) for layer in stack.layers) // config.training.expert_parallel
        for _, stack in space.hull().stacks
    }
    found: Counter[str] = Counter()
    for one in hlo.instructions(text):
        if one.opcode in ("gather", "scatter"):
            shape = hlo_text.dimensions(one.shape)
            matrix = len(shape) >= 3 and shape[-1] in widths and shape[-2] in sizes
            rows = len(shape) == 2 and shape[-1] in widths and shape[0] in totals
            found[one.opcode] += matrix or rows
    return +found


def _trips(subnet: Subnet) -> hlo.Trips:
    """How often the loops of a supernet's step run for its largest subnet."""
    stacks = dict(subnet.stacks)

    def trips(name: str) -> int | None:
        if found := _LAYERS.search(name):
            stack = stacks[found[1]]
            return len(stack.layers) if stack.embed_dim == int(found[2]) else 0
        if REST in name:
            return 0
        if found := _CHUNKS.search(name):
            return int(found[1]) if stacks["decoder"].embed_dim == int(found[2]) else 0
        return None

    return trips


def describe(
    compiled: Compiled, topology: Topology, bucket: Bucket, training: TrainingConfig
) -> Iterator[str]:
    """Lines of text: memory, costs, what bounds an update, and how long all updates take."""
    chip, costs, n = topology.chip, compiled.costs, len(topology.devices)
    batches = n * compiled.n_micro
    pairs = f"{bucket.rows} pairs of {bucket.target} tokens"
    yield f"step: {n} chips x {compiled.n_micro} micro-batch(es) of {pairs}"
    if batches != training.batches_per_step:
        yield (
            f"batches_per_step is {training.batches_per_step}, which training refuses here: it "
            f"needs a multiple of {n}, as {batches}"
        )
    yield f"compiled for {topology.name}, {n} chips, in {compiled.seconds:.0f} s"
    total, parts = memory_parts(compiled.memory)
    words = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    yield f"memory of a chip: {total / 1e9:.2f} of {chip.memory / 1e9:.1f} GB ({words})"
    sent = sum(costs.sent.values())
    collectives = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in costs.sent.items())
    yield (
        f"an update of the largest subnet, on a chip: {costs.flops / 1e12:.3g} TFLOP, "
        f"{costs.memory_bytes / 1e9:.3g} GB read and written, {sent / 1e9:.3g} GB sent"
        + (f" ({collectives})" if collectives else "")
    )
    if costs.unknown_loops or costs.unknown_kernels:
        yield (
            f"not counted in full: {costs.unknown_loops} loops, of which one round counts, and "
            f"{costs.unknown_kernels} kernels, of which only memory counts"
        )
    seconds = bounds(costs, chip)
    bound = max(seconds, key=lambda name: seconds[name])
    longest = seconds[bound]
    times = ", ".join(f"{k} {1e3 * s:.3g} ms ({s / longest:.0%})" for k, s in seconds.items())
    tokens, updates = batches * bucket.rows * bucket.target, training.steps
    yield f"at the chip's peaks ({chips.SOURCE}): {times}; bound by {bound}"
    yield (
        f"at that bound: {tokens / longest:,.0f} tokens/s, {updates:,} updates of {tokens:,} "
        f"tokens in {updates * longest / 86400:.2g} days; no program reaches it"
    )


def memory_parts(analysis: Any) -> tuple[int, dict[str, int]]:
    """Bytes of a compiled program in all, and of its parts, from XLA's `CompiledMemoryStats`."""
    parts = {
        "state and batch": analysis.argument_size_in_bytes,
        "working": analysis.temp_size_in_bytes,
        "other output": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    return sum(parts.values()), parts


def bounds(costs: Costs, chip: Chip) -> dict[str, float]:
    """Seconds that each part of an update takes at least, at the chip's peaks."""
    return {
        "compute": costs.flops / chip.flops,
        "memory": costs.memory_bytes / chip.memory_bandwidth,
        "network": sum(costs.sent.values()) / chip.network_bandwidth,
    }
