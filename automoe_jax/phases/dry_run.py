"""What a training step would take: compiled on abstract inputs, nothing allocated."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.config import RunConfig
from automoe_jax.system.progress import Progress
from automoe_jax.training import loop, optimizer, parallel, sampling
from automoe_jax.training.loop import TrainingTarget
from automoe_jax.training.step import make_train_step

# Sentence length of the batch that is compiled for: the paper's.
LENGTH = 30


def describe(
    config: RunConfig, vocab_sizes: tuple[int, int], subnet: Subnet | None, progress: Progress
) -> Iterator[str]:
    """Lines of text: parameters, the batch, compile time, memory per device.

    Args:
      config: of the run.
      vocab_sizes: of source and target.
      subnet: to train; None for the supernet.
      progress: told that it compiles.
    """
    what = TrainingTarget(config.space, vocab_sizes, config.model, subnet)
    training = config.training if subnet is None else config.subnet_training
    share = parallel.share()
    n_micro = loop.micro_batches(training, share.n_devices)
    abstract = loop.abstract_state(what, training, config.seed)
    n_params = sum(x.size for x in jax.tree.leaves(abstract.params))
    name = "supernet" if subnet is None else "subnet"
    yield f"{name}: {n_params:,} parameters, embedding table included"
    if subnet is None:
        for label, corner in (
            ("largest", what.space.largest()),
            ("smallest", what.space.smallest()),
        ):
            counts = complexity.count(corner)
            yield (
                f"{label} subnet: {counts.params / 1e6:.2f} M parameters without embeddings, "
                f"{counts.active_params / 1e6:.2f} M active, {counts.flops / 1e9:.3f} GFLOPs"
            )
    rows = max(training.tokens_per_batch // LENGTH, 1)
    yield (
        f"step: {share.n_devices} device(s) x {n_micro} micro-batch(es) of {rows} pairs of "
        f"{LENGTH} tokens: {share.n_devices * n_micro * rows * LENGTH:,} tokens"
    )

    devices = share.n_local_devices
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype), abstract)
    ids = jax.ShapeDtypeStruct((devices, n_micro, rows, LENGTH), jnp.int32)
    choices = None
    if subnet is None:
        drawn = [[what.space.largest()] * n_micro] * share.n_devices
        choices = sampling.stack(drawn, what.hull, share)
    step = parallel.map_train_step(
        make_train_step(
            what.module(), optimizer.make(training), training.label_smoothing, training.load_balance
        )
    )
    progress.note("compiling the step")
    start = time.monotonic()
    batch = {"source": ids, "target": ids}
    lowered = step.lower(state, batch, choices, jax.random.key(0))
    compiled = lowered.compile()
    yield f"compiled in {time.monotonic() - start:.1f} s"
    memory = compiled.memory_analysis()
    if memory is None:
        yield "memory per device: this platform does not say"
        return
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    yield (
        f"memory per device: {_gb(arguments + temporary + output)} "
        f"(state and batch {_gb(arguments)}, working {_gb(temporary)}, other output {_gb(output)})"
    )


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"
