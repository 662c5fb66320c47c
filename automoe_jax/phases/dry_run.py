"""Size of a training step: compiled for abstract inputs, without data or weights."""

import time
from collections.abc import Iterator
from typing import Any

import jax

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.plan import Bucket
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.phases import topology as topologies
from automoe_jax.phases.prepare import vocab_sizes
from automoe_jax.phases.run import Run
from automoe_jax.phases.weights import target
from automoe_jax.training import parallel, sampling
from automoe_jax.training.steps import mapped_step, micro_batches, step_arguments
from automoe_jax.training.target import abstract_state

LENGTH = 30  # of the batch's sentences, as in the paper


def describe(run: Run, subnet: Subnet | None, topology: str = "") -> Iterator[str]:
    """Lines of text: parameters, batch, compile time, memory per device.

    The run need not exist. Without a subnet, it is the supernet's step. With a topology, as
    "v5e:2x4", it is compiled for those TPUs, and the lines say what an update costs there.
    """
    config = run.config
    found = topologies.find(topology) if topology else None
    # The tokenizer of converted weights is not the config's.
    made = run.tokenizer.is_dir()
    sizes = vocab_sizes(run) if made else tokenizers.vocab_sizes(config.tokenizer)
    model = target(config, sizes, subnet)
    training = config.training if subnet is None else config.subnet_training
    state = abstract_state(model, training, config.seed)
    n_params = sum(x.size for x in jax.tree.leaves(state.params))
    name = "supernet" if subnet is None else "subnet"
    yield f"{name}: {n_params:,} parameters, embedding table included"
    if subnet is None:
        yield from _corners(model.space)
    rows = max(training.tokens_per_batch // LENGTH, 1)
    bucket = Bucket(rows, LENGTH, LENGTH)
    if found is not None:
        run.progress.note(f"compiling the step for {topology}")
        compiled = topologies.compile_step(model, config, training, found, bucket)
        yield from topologies.describe(compiled, found, bucket, training)
        return
    share = parallel.share()
    n_micro = micro_batches(training, share.n_devices)
    yield (
        f"step: {share.n_devices} device(s) x {n_micro} micro-batch(es) of {rows} pairs of "
        f"{LENGTH} tokens: {share.n_devices * n_micro * rows * LENGTH:,} tokens"
    )
    drawn = None
    if subnet is None:
        sizes = config.seed, config.sampling.largest_first, share.n_devices, n_micro
        drawn = sampling.draw(model.space, *sizes, config.sampling)
    arguments = step_arguments(model, training, config.seed, bucket, drawn)
    step = mapped_step(model, training, config.sampling)
    run.progress.note("compiling the step")
    start = time.monotonic()
    compiled = step.lower(*arguments).compile()
    yield f"compiled in {time.monotonic() - start:.1f} s"
    yield f"memory per device: {_memory(compiled.memory_analysis())}"


def _corners(space: SearchSpace) -> Iterator[str]:
    for name, subnet in (("largest", space.largest()), ("smallest", space.smallest())):
        counts = complexity.count(subnet)
        yield (
            f"{name} subnet: {counts.params / 1e6:.2f} M parameters without embeddings, "
            f"{counts.active_params / 1e6:.2f} M active, {counts.flops / 1e9:.3f} GFLOPs"
        )


def _memory(analysis: Any) -> str:
    if analysis is None:
        return "this platform does not say"
    total, parts = topologies.memory_parts(analysis)
    words = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"{total / 1e9:.2f} GB ({words})"
