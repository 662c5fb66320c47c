"""The grouped expert FFN beside masked experts, a dense FFN and a plain matrix product.

python benchmarks/grouped_ffn.py --json
python benchmarks/grouped_ffn.py --tokens=8192,32768 --dtype=bfloat16

Forward and backward, runs interleaved. On a CPU: against every token through every expert under
masks, in GFLOP/s of useful work beside a matrix product of the FFN's size, and 16 experts beside
6. On an accelerator: against the dense FFN of the same active FLOPs, for 8,192 to 65,536 tokens,
and, in bfloat16, as a share of the chip's published peak; the goal is that of 32,768 tokens. The
last line is JSON; the exit code is 1 where a goal is missed.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

from automoe_jax.cli import process
from automoe_jax.ops import grouped_ffn as op
from automoe_jax.ops.grouping import ExpertWeights

SIZES = (1024, 2048, 3072)
CPU_TOKENS, ACCELERATOR_TOKENS = "2048", "8192,16384,32768,65536"
JUDGED = 32768  # tokens for which an accelerator has a goal


def setup(n: int, d: int, sizes: list[int], dtype, routing: str, rng):
    """(x, expert of each token, weights in slots of the largest size, cotangent)."""
    n_experts, slot = len(sizes), max(sizes)
    total = n_experts * slot

    def array(*shape, scale):
        return jnp.asarray(rng.normal(0, scale, shape), dtype)

    weights = ExpertWeights(
        array(total, d, scale=d**-0.5),
        array(total, scale=0.1),
        array(total, d, scale=slot**-0.5),
        array(n_experts, d, scale=0.1),
    )
    if routing == "uniform":
        expert = rng.integers(n_experts, size=n)
    else:  # an untrained router sends most tokens to a few experts
        share = rng.dirichlet(np.full(n_experts, 0.5))
        expert = rng.choice(n_experts, size=n, p=share)
    return array(n, d, scale=1.0), jnp.asarray(expert), weights, array(n, d, scale=1.0)


def gradients(f):
    """x, weights, dy -> (y, dx, dweights), compiled."""

    def both(x, weights, dy):
        y, pull = jax.vjp(f, x, weights)
        return y, *pull(dy)

    return jax.jit(both)


def dense(x, weights):
    """A plain FFN with all columns of the weights."""
    h = jax.nn.relu(x @ weights.fc1_FD.T + weights.fc1_bias_F)
    return h @ weights.fc2_FD + weights.fc2_bias_ED[0]


class Problem:
    """Operands of experts' FFNs, and the functions that compute them."""

    def __init__(self, n: int, d: int, sizes: list[int], dtype, routing: str, backend: str | None):
        rng = np.random.default_rng(0)
        self.x, expert, self.weights, self.dy = setup(n, d, sizes, dtype, routing, rng)
        self._of = expert, np.array(sizes), (max(sizes),) * len(sizes)
        self._backend = backend
        active = np.array(sizes)[np.asarray(expert)].sum()
        self.mean_size = int(active) // n
        self.flop = 12 * d * int(active)  # two products, forward once and backward twice

    def grouped(self, x, w):
        expert, sizes, slots = self._of
        return op.grouped_ffn(x, expert, w, sizes, slots, self._backend)

    def masked(self, x, w):
        expert, sizes, slots = self._of
        return op.dense_reference(x, expert, w, sizes, slots)

    def front(self) -> ExpertWeights:
        """The weights of one FFN as large as an expert is on average."""
        w, n = self.weights, self.mean_size
        return ExpertWeights(w.fc1_FD[:n], w.fc1_bias_F[:n], w.fc2_FD[:n], w.fc2_bias_ED[:1])

    def call(self, f, weights: ExpertWeights | None = None):
        """A compiled call of f's value and gradients."""
        program = gradients(f)
        return lambda: program(self.x, weights or self.weights, self.dy)


def compare(args: argparse.Namespace, n: int, sizes: list[int], dtype) -> dict[str, Any]:
    """Seconds and rates for n tokens."""
    cpu = jax.default_backend() == "cpu"

    def problem(sizes: list[int]) -> Problem:
        return Problem(n, args.embed_dim, sizes, dtype, args.routing, args.backend)

    own = problem(sizes)
    a, b = own.x, own.weights.fc1_FD[: max(sizes)].T
    plain = jax.jit(jnp.matmul)
    calls = {
        "grouped": own.call(own.grouped),
        "dense_of_same_flops": own.call(dense, own.front()),
        "matmul": lambda: plain(a, b),
    }
    if cpu:
        calls["masked"] = own.call(own.masked)
        # The same mean size gives the tokens the same work.
        many = problem(
            [sizes[i % len(sizes)] for i in range(15)] + [sorted(sizes)[len(sizes) // 2]]
        )
        calls["grouped_16_experts"] = many.call(many.grouped)
    times = measure.interleaved(calls, args.runs)
    median = {name: float(np.median(seconds)) for name, seconds in times.items()}
    row: dict[str, Any] = {
        "tokens": n,
        "useful_gflop": own.flop / 1e9,
        "seconds": {name: measure.spread(seconds) for name, seconds in times.items()},
        "matmul_gflops": 2 * n * args.embed_dim * max(sizes) / median["matmul"] / 1e9,
        "grouped_gflops": own.flop / median["grouped"] / 1e9,
        "speed_of_dense_layer": median["dense_of_same_flops"] / median["grouped"],
    }
    if peak := measure.published_peak(dtype):
        row["share_of_peak"] = 1e9 * row["grouped_gflops"] / peak
    if cpu:
        row["times_faster_than_masked"] = median["masked"] / median["grouped"]
        row["share_of_matmul_rate"] = row["grouped_gflops"] / row["matmul_gflops"]
        row["time_of_16_experts_over_6"] = median["grouped_16_experts"] / median["grouped"]
    return row


def goals_of(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The goals of a row; those of an accelerator speak of `JUDGED` tokens."""
    if "times_faster_than_masked" not in row:
        if row["tokens"] != JUDGED:
            return {}
        return {
            "speed_of_dense_layer": measure.goal(row["speed_of_dense_layer"], 0.6, at_most=False)
        }
    faster, share = row["times_faster_than_masked"], row["share_of_matmul_rate"]
    return {
        "times_faster_than_masked": measure.goal(faster, 7, at_most=False),
        "share_of_matmul_rate": measure.goal(share, 0.56, at_most=False),
        "time_of_16_experts_over_6": measure.goal(row["time_of_16_experts_over_6"], 1.3),
    }


def main():
    process.prepare(compiling=True)
    cpu = jax.default_backend() == "cpu"
    default = CPU_TOKENS if cpu else ACCELERATOR_TOKENS
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", default=default, help=f"with commas; here {default}")
    parser.add_argument("--embed_dim", type=int, default=640)
    parser.add_argument("--sizes", default="", help="FFN sizes of the 6 experts, with commas")
    parser.add_argument("--routing", choices=("uniform", "skewed"), default="uniform")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="")
    parser.add_argument("--backend", choices=op.BACKENDS, default=None)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument(
        "--json", action="store_true", help="accepted; the output is JSON in any case"
    )
    args = parser.parse_args()
    tokens = measure.integers(parser, "--tokens", args.tokens, 1)
    sizes = [*SIZES, *SIZES]
    if args.sizes:
        sizes = measure.integers(parser, "--sizes", args.sizes, 1)
    if min(args.embed_dim, args.runs) < 1:
        parser.error("--embed_dim and --runs must be at least 1")
    dtype = jnp.dtype(args.dtype or ("float32" if cpu else "bfloat16"))
    rows = [compare(args, n, sizes, dtype) for n in tokens]
    result = {
        "embed_dim": args.embed_dim,
        "sizes": sizes,
        "routing": args.routing,
        "dtype": str(dtype),
        "backend": args.backend or op.default_backend(),
        "runs": args.runs,
        **measure.machine(),
        "rows": rows,
    }
    goals = {}
    for row in rows:
        goals |= {f"{name}, {row['tokens']} tokens": g for name, g in goals_of(row).items()}
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
