"""Grouped expert FFN beside a plain FFN of the same FLOPs and beside running all experts.

python benchmarks/grouped_ffn.py --tokens=4096 --sizes=3072,2048,1024

Prints one JSON line: milliseconds and, of the grouped one's time over the others', the ratio with
its 95 % interval, forward and with gradients. Runs are interleaved.
"""

import argparse
import json
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from automoe_jax.latency import ratio, summarise
from automoe_jax.ops.grouped_ffn import ExpertWeights, grouped_ffn


def ffn(x_ND, fc1_FD, fc1_bias_F, fc2_FD, fc2_bias_D):
    return jax.nn.relu(x_ND @ fc1_FD.T + fc1_bias_F) @ fc2_FD + fc2_bias_D


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--embed_dim", type=int, default=512)
    parser.add_argument("--sizes", default="3072,2048,1024", help="FFN size of each expert")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    try:
        sizes = [int(size) for size in args.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes is {args.sizes!r}; give integers with commas between")
    if min(sizes) < 1 or min(args.tokens, args.embed_dim, args.runs) < 1:
        parser.error("tokens, embed_dim, runs and every size must be at least 1")

    rng = np.random.default_rng(0)
    n, d, total = args.tokens, args.embed_dim, sum(sizes)
    shapes = ((total, d), (total,), (total, d), (len(sizes), d))
    weights = ExpertWeights(*(jnp.asarray(rng.normal(0, 0.05, s), jnp.float32) for s in shapes))
    offsets = np.cumsum([0, *sizes[:-1]])
    x = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
    expert = jnp.asarray(np.arange(n) % len(sizes))
    mean = total // len(sizes)

    def grouped(x, w):
        return grouped_ffn(x, expert, w, offsets, np.array(sizes), max(sizes))

    def plain(x, w):
        return ffn(x, w.fc1_FD[:mean], w.fc1_bias_F[:mean], w.fc2_FD[:mean], w.fc2_bias_ED[0])

    def all_experts(x, w):
        y = jnp.zeros_like(x)
        for e, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
            own = slice(start, start + size)
            own_y = ffn(x, w.fc1_FD[own], w.fc1_bias_F[own], w.fc2_FD[own], w.fc2_bias_ED[e])
            y = jnp.where((expert == e)[:, None], own_y, y)
        return y

    def gradient(f):
        return jax.grad(lambda x, w: f(x, w).sum(), (0, 1))

    result = {
        "tokens": n,
        "embed_dim": d,
        "sizes": sizes,
        "runs": args.runs,
        "machine": platform.processor() or platform.machine(),
        "device": jax.devices()[0].device_kind,
    }
    for what, change in (("forward", lambda f: f), ("with_gradient", gradient)):
        programs = {
            name: jax.jit(change(f))
            for name, f in (("grouped", grouped), ("plain", plain), ("all_experts", all_experts))
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        for run in range(args.runs + 2):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(x, weights))
                if run >= 2:  # compiled and warm
                    times[name].append(1e3 * (time.perf_counter() - start))
        result[what] = {f"{name}_ms": summarise(own).mean_ms for name, own in times.items()}
        result[what] |= {
            f"grouped_over_{name}": ratio(times["grouped"], times[name])
            for name in ("plain", "all_experts")
        }
    # The upper end of the interval: faster than running all experts, beyond the noise.
    result["goals"] = {}
    for what in ("forward", "with_gradient"):
        value = result[what]["grouped_over_all_experts"][2]
        goal = {"value": value, "goal": 1.0, "met": value < 1.0}
        result["goals"][f"{what}_over_all_experts"] = goal
    print(json.dumps(result))
    if not all(goal["met"] for goal in result["goals"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
