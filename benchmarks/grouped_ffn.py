"""The grouped expert FFN beside masked experts, a dense FFN and a plain matrix product.

python benchmarks/grouped_ffn.py --json
python benchmarks/grouped_ffn.py --tokens=32768 --dtype=bfloat16

Forward and backward, runs interleaved. On a CPU: against every token through every expert under
masks, in GFLOP/s of useful work beside a matrix product of the FFN's size, and 16 experts beside
6. On a GPU: against the dense FFN of the same active FLOPs. The last line is JSON; the exit code
is 1 where a goal is missed.
"""

import argparse

import jax
import jax.numpy as jnp
import measure
import numpy as np

from automoe_jax.cli import process
from automoe_jax.ops import grouped_ffn as op
from automoe_jax.ops.grouping import ExpertWeights

SIZES = (1024, 2048, 3072)


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


def main():
    process.prepare(compiling=True)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=0, help="default: 2,048; on a GPU 32,768")
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
    cpu = jax.default_backend() == "cpu"
    n, d = args.tokens or (2048 if cpu else 32768), args.embed_dim
    try:
        sizes = [int(s) for s in args.sizes.split(",")] if args.sizes else [*SIZES, *SIZES]
    except ValueError:
        parser.error(f"--sizes is {args.sizes!r}; give integers with commas between")
    if min(sizes) < 1 or min(n, d, args.runs) < 1:
        parser.error("tokens, embed_dim, runs and every size must be at least 1")
    dtype = jnp.dtype(args.dtype or ("float32" if cpu else "bfloat16"))
    rng = np.random.default_rng(0)

    def problem(sizes):
        x, expert, weights, dy = setup(n, d, sizes, dtype, args.routing, rng)
        slots = (max(sizes),) * len(sizes)

        def grouped(x, w):
            return op.grouped_ffn(x, expert, w, np.array(sizes), slots, args.backend)

        def masked(x, w):
            return op.dense_reference(x, expert, w, np.array(sizes), slots)

        active = np.array(sizes)[np.asarray(expert)].sum()
        flop = 12 * d * int(active)  # two products, forward once and backward twice
        return (x, weights, dy), grouped, masked, flop

    operands, grouped, masked, flop = problem(sizes)
    mean = flop // (12 * d * n)
    x, weights, dy = operands
    front = ExpertWeights(
        weights.fc1_FD[:mean], weights.fc1_bias_F[:mean], weights.fc2_FD[:mean],
        weights.fc2_bias_ED[:1],
    )  # fmt: skip
    programs = {"grouped": gradients(grouped), "dense": gradients(dense)}
    calls = {
        "grouped": lambda: programs["grouped"](x, weights, dy),
        "dense_of_same_flops": lambda: programs["dense"](x, front, dy),
    }
    a, b = x, weights.fc1_FD[: max(sizes)].T
    plain = jax.jit(jnp.matmul)
    calls["matmul"] = lambda: plain(a, b)
    if cpu:
        programs["masked"] = gradients(masked)
        calls["masked"] = lambda: programs["masked"](x, weights, dy)
        # The same mean size gives the tokens the same work.
        more = [sizes[i % len(sizes)] for i in range(15)] + [sorted(sizes)[len(sizes) // 2]]
        many_operands, many, _, _ = problem(more)
        programs["many"] = gradients(many)
        calls["grouped_16_experts"] = lambda: programs["many"](*many_operands)
    times = measure.interleaved(calls, args.runs)
    median = {name: float(np.median(own)) for name, own in times.items()}
    matmul_rate = 2 * n * d * max(sizes) / median["matmul"]
    rate = flop / median["grouped"]
    result = {
        "tokens": n,
        "embed_dim": d,
        "sizes": sizes,
        "routing": args.routing,
        "dtype": str(dtype),
        "backend": args.backend or op.default_backend(),
        "runs": args.runs,
        **measure.machine(),
        "useful_gflop": flop / 1e9,
        "seconds": {name: measure.spread(own) for name, own in times.items()},
        "matmul_gflops": matmul_rate / 1e9,
        "grouped_gflops": rate / 1e9,
    }
    if cpu:
        goals = {
            "times_faster_than_masked": measure.goal(
                median["masked"] / median["grouped"], 7, at_most=False
            ),
            "share_of_matmul_rate": measure.goal(rate / matmul_rate, 0.56, at_most=False),
            "time_of_16_experts_over_6": measure.goal(
                median["grouped_16_experts"] / median["grouped"], 1.3
            ),
        }
    else:
        goals = {
            "speed_of_dense_layer": measure.goal(
                median["dense_of_same_flops"] / median["grouped"], 0.6, at_most=False
            )
        }
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
