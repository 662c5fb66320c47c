"""One update on an accelerator: the supernet's largest subnet beside the dense model of its FLOPs.

python benchmarks/accelerator_step.py --json                     # on the devices that JAX finds
python benchmarks/accelerator_step.py --tokens=512 --small       # to try it out, on a CPU

The largest subnet of the paper's space (640 wide, 6 + 6 layers, 6 experts of 3,072 each) and the
dense Transformer with one FFN of 3,072 in each layer compute as much for a token. Their mapped
train steps are timed in turns, for each number of tokens a device, in bfloat16; beside them are the
rate of a large matrix product and, where the chip is known, its published peak. The last line is
JSON; the exit code is 1 where the supernet reaches less than 0.7 of the dense model's FLOP/s.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from train_step import useful_flop

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.training import parallel, sampling
from automoe_jax.training.config import ModelConfig, SamplingConfig, TrainingConfig
from automoe_jax.training.sharding import Layout
from automoe_jax.training.steps import mapped_step
from automoe_jax.training.target import TrainingTarget, initial_state

LENGTH = 32
SMALL = {
    "qkv_dim": 32, "encoder_embed_dims": (32,), "decoder_embed_dims": (32,),
    "encoder_ffn_dims": (64, 128), "decoder_ffn_dims": (64, 128),
}  # fmt: skip


def dense(subnet: Subnet) -> Subnet:
    """The subnet with the first expert of each layer alone."""

    def of(stack: Any) -> Any:
        layers = (dataclasses.replace(x, experts=x.experts[:1], top_k=1) for x in stack.layers)
        return dataclasses.replace(stack, layers=tuple(layers))

    return dataclasses.replace(subnet, encoder=of(subnet.encoder), decoder=of(subnet.decoder))


class Update:
    """The train step of a model on all devices, compiled for a batch shape."""

    def __init__(self, target: TrainingTarget, config: TrainingConfig, tokens: int, vocab: int):
        n = jax.local_device_count()
        ids = np.random.default_rng(0).integers(4, vocab, (n, 1, tokens // LENGTH, LENGTH))
        self._batch = {side: ids.astype(np.int32) for side in ("source", "target")}
        active = None
        if target.subnet is None:
            drawn = [[target.space.largest()]] * n
            active = sampling.stack(drawn, target.hull, parallel.share())
        self._rest = active, jax.random.key(0)
        self._state = parallel.place(initial_state(target, config, 0), Layout())
        step = mapped_step(target, config, SamplingConfig())
        self._step = step.lower(self._state, self._batch, *self._rest).compile()

    def __call__(self) -> Any:
        self._state, out = self._step(self._state, self._batch, *self._rest)
        return out


def compare(space: SearchSpace, tokens: int, dtype: str, vocab: int, runs: int) -> dict[str, Any]:
    """Both models with so many tokens a device, and their shares of the product's rate."""
    largest = space.largest()
    models = {"largest": (None, largest), "dense": (dense(largest), dense(largest))}
    config = TrainingConfig(tokens_per_batch=tokens, batches_per_step=1, compute_dtype=dtype)
    updates = {}
    for name, (own, _) in models.items():
        target = TrainingTarget(space, (vocab, vocab), ModelConfig(), own)
        updates[name] = Update(target, config, tokens, vocab)
    size = min(8192, 4 * tokens)
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    times = measure.interleaved({**updates, "matmul": lambda: product(a, a)}, runs)
    product_rate = 2 * size**3 / float(np.median(times["matmul"]))
    found: dict[str, Any] = {"tokens": tokens, "matmul_tflops": product_rate / 1e12}
    peak = measure.published_peak(dtype)
    for name, (_, subnet) in models.items():
        flop = useful_flop(subnet, tokens // LENGTH, LENGTH, vocab)
        rate = flop / float(np.median(times[name]))
        found[name] = {
            "seconds": measure.spread(times[name]),
            "tflops": rate / 1e12,
            "share_of_matmul": rate / product_rate,
            "target_tokens_per_s": tokens / float(np.median(times[name])),
        }
        if peak:
            found[name]["share_of_peak"] = rate / peak
    found["share_of_dense"] = found["largest"]["tflops"] / found["dense"]["tflops"]
    return found


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", default="8192,16384,32768,65536", help="of a device, commas")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a tiny space and vocabulary")
    parser.add_argument(
        "--json", action="store_true", help="accepted; the output is JSON in any case"
    )
    args = parser.parse_args()
    sizes = measure.integers(parser, "--tokens", args.tokens, LENGTH)
    if args.runs < 1:
        parser.error(f"--runs is {args.runs}; give at least 1")
    space = SearchSpace(**SMALL) if args.small else SearchSpace()
    vocab = 512 if args.small else 32768
    rows = [compare(space, n, args.dtype, vocab, args.runs) for n in sizes]
    worst = min(row["share_of_dense"] for row in rows)
    result = {"dtype": args.dtype, "runs": args.runs, **measure.machine(), "rows": rows}
    goals = {"share_of_dense": measure.goal(worst, 0.7, at_most=False)}
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
