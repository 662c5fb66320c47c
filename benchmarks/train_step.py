"""One update of a full-size supernet: seconds, memory and compilations beside its floor.

python benchmarks/train_step.py --json

Times forward, backward and Adam in fp32 on the paper's space (640 wide, FFNs up to 3,072, 6
experts, 32,768 words) with 2,040 target tokens in sentences of 30: the largest subnet, the smallest
and five random ones, through the program's own mapped train step, in turns. The same step under
masks alone (every layer, every expert, the full width) is timed beside it. The floor of a subnet is
its useful arithmetic at the rate of a large matrix product plus the optimizer's bytes at the
memory's bandwidth, both measured in the same run. The last line is JSON; the exit code is 1 where a
goal is missed. Takes 8 minutes on 2 cores.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import measure
import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.cli import process
from automoe_jax.data.batches import Share
from automoe_jax.system import malloc
from automoe_jax.training import optimizer, parallel, sampling
from automoe_jax.training.config import ModelConfig, TrainingConfig
from automoe_jax.training.sharding import Layout
from automoe_jax.training.step import make_train_step
from automoe_jax.training.target import TrainingTarget, initial_state

# Adam: reads gradient, weight and both moments, writes the last three, in fp32.
OPTIMIZER_BYTES = 28


def useful_flop(subnet: Subnet, rows: int, length: int, vocab_size: int) -> float:
    """FLOPs of the forward and backward products of a teacher-forced batch.

    Counts every product once forward and twice backward, with attention's scores and sums, without
    routers, norms and softmaxes.
    """
    tokens = rows * length
    q, total = subnet.qkv_dim, 0
    d_e, d_d = subnet.encoder.embed_dim, subnet.decoder.embed_dim

    def ffn(layer, d: int) -> float:
        # A random router sends a token through the mean size.
        return layer.top_k * float(np.mean(layer.experts)) * 2 * d

    for layer in subnet.encoder.layers:
        total += 4 * d_e * q + 2 * length * q + ffn(layer, d_e)
    for layer in subnet.decoder.layers:
        total += 4 * d_d * q + 2 * length * q + ffn(layer, d_d)
        keys = layer.cross_span * length
        total += 2 * d_d * q + 2 * layer.cross_span * d_e * q + 2 * keys * q
    total += d_d * vocab_size
    return 6.0 * tokens * total


class Step:
    """A compiled train step."""

    def __init__(self, target: TrainingTarget, config: TrainingConfig, *, masked: bool):
        module = target.module()
        if masked:
            module = module.clone(masked=True)
        step = make_train_step(
            module, optimizer.make(config), config.label_smoothing, config.load_balance
        )
        self._step = parallel.map_train_step(step)
        self._hull = target.hull
        self._key = jax.random.key(0)

    def compile(self, state, batch, subnet: Subnet) -> float:
        """Seconds to compile for the shapes of these arguments."""
        start = time.perf_counter()
        arguments = (state, batch, self._choice(subnet), self._key)
        self.compiled = self._step.lower(*arguments).compile()
        return time.perf_counter() - start

    def __call__(self, state, batch, subnet: Subnet):
        """(new state, metrics, seconds)."""
        choice = self._choice(subnet)
        start = time.perf_counter()
        state, out = self.compiled(state, batch, choice, self._key)
        jax.block_until_ready((state, out))
        return state, out, time.perf_counter() - start

    def jitted(self, state, batch, subnet: Subnet):
        """(new state, metrics), by the jitted function that training calls."""
        return self._step(state, batch, self._choice(subnet), self._key)

    def _choice(self, subnet: Subnet):
        return sampling.stack([[subnet]], self._hull, Share(0, 1, 1))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a step trains: a supernet, its state, a batch, and subnets by name."""

    target: TrainingTarget
    config: TrainingConfig
    state: Any
    batch: dict[str, np.ndarray]
    subnets: dict[str, Subnet]


def full_size(rows: int = 68, length: int = 30, vocab_size: int = 32768) -> Problem:
    """The paper's space on one batch, with the largest, the smallest and five random subnets."""
    space, config = SearchSpace(), TrainingConfig()
    target = TrainingTarget(space, (vocab_size, vocab_size), ModelConfig())
    rng = np.random.default_rng(0)
    ids = rng.integers(4, vocab_size, (1, 1, rows, length)).astype(np.int32)
    batch = {"source": ids, "target": rng.permuted(ids, axis=-1)}
    batch["target"][..., -1] = 2
    subnets = {"largest": space.largest(), "smallest": space.smallest()}
    subnets |= {f"random_{i}": space.sample(np.random.default_rng(i)) for i in range(5)}
    state = parallel.place(initial_state(target, config, 0), Layout())
    return Problem(target, config, state, batch, subnets)


def main():
    process.prepare(compiling=True)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=68, help="sentences")
    parser.add_argument("--length", type=int, default=30, help="tokens of a sentence")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--runs", type=int, default=5, help="timed runs per subnet")
    parser.add_argument("--masked_runs", type=int, default=1, help="the same under masks; 0: none")
    parser.add_argument("--subnets", type=int, default=1000, help="for the count of compilations")
    parser.add_argument(
        "--json", action="store_true", help="accepted; the output is JSON in any case"
    )
    args = parser.parse_args()
    if min(args.rows, args.length, args.runs, args.subnets) < 1 or args.vocab_size < 8:
        parser.error("rows, length, runs and subnets must be at least 1, vocab_size at least 8")
    if args.masked_runs < 0:
        parser.error("masked_runs cannot be negative")

    problem = full_size(args.rows, args.length, args.vocab_size)
    target, config, subnets = problem.target, problem.config, problem.subnets
    state, batch = problem.state, problem.batch
    n_params = sum(x.size for x in jax.tree.leaves(state.params))

    step = Step(target, config, masked=False)
    compile_s = step.compile(state, batch, subnets["largest"])
    memory: Any = step.compiled.memory_analysis()
    times: dict[str, list[float]] = {name: [] for name in subnets}
    rates, bandwidths = [], []
    for run in range(1 + args.runs):
        rates.append(measure.matmul_rate())
        bandwidths.append(measure.memory_bandwidth())
        for name, subnet in subnets.items():
            state, _, seconds = step(state, batch, subnet)
            if run:
                times[name].append(seconds)
    # Read here: the masked step takes more.
    peak = measure.peak_memory_bytes()

    compilations = _compilations(target.space, args.subnets)

    masked: dict[str, list[float]] = {name: [] for name in ("largest", "smallest")}
    masked_compile_s = None
    if args.masked_runs:
        plain = Step(target, config, masked=True)
        masked_compile_s = plain.compile(state, batch, subnets["largest"])
        beside: dict[str, list[float]] = {name: [] for name in masked}
        for _ in range(1 + args.masked_runs):
            for name, own in masked.items():
                state, _, seconds = plain(state, batch, subnets[name])
                own.append(seconds)
                state, _, seconds = step(state, batch, subnets[name])
                beside[name].append(seconds)

    rate, bandwidth = float(np.median(rates)), float(np.median(bandwidths))
    optimizer_s = OPTIMIZER_BYTES * n_params / bandwidth
    tokens = args.rows * args.length
    rows: dict[str, dict[str, Any]] = {}
    for name, subnet in subnets.items():
        flop = useful_flop(subnet, args.rows, args.length, args.vocab_size)
        floor = flop / rate + optimizer_s
        median = float(np.median(times[name]))
        rows[name] = {
            "seconds": measure.spread(times[name]),
            "floor_s": floor,
            "over_floor": median / floor,
            "useful_gflop": flop / 1e9,
            "target_tokens_per_s": tokens / median,
            "active_params": complexity.count(subnet).active_params,
        }
    random_rows = [row for name, row in rows.items() if name.startswith("random")]
    mean = float(np.mean([row["seconds"]["median"] for row in random_rows]))
    mean_floor = float(np.mean([row["floor_s"] for row in random_rows]))
    result = {
        "rows": args.rows,
        "length": args.length,
        "vocab_size": args.vocab_size,
        "target_tokens": tokens,
        "params": n_params,
        "runs": args.runs,
        **measure.machine(),
        "huge_pages": malloc.active(),
        "matmul_gflops": measure.spread([r / 1e9 for r in rates]),
        "bandwidth_gb_s": measure.spread([b / 1e9 for b in bandwidths]),
        "optimizer_floor_s": optimizer_s,
        "subnets": rows,
        "mean_of_random": {"seconds": mean, "floor_s": mean_floor},
        "compile_s": compile_s,
        "compilations": compilations,
        "peak_memory_gb": peak / 1e9,
        "step_memory_gb": {
            "state_and_batch": memory.argument_size_in_bytes / 1e9,
            "working": memory.temp_size_in_bytes / 1e9,
        },
    }
    if args.masked_runs:
        result["masked"] = {
            "compile_s": masked_compile_s,
            "seconds": {name: measure.spread(own[1:]) for name, own in masked.items()},
            "times_faster": {
                name: float(np.median(own[1:]) / np.median(beside[name][1:]))
                for name, own in masked.items()
            },
        }
    median = {name: row["seconds"]["median"] for name, row in rows.items()}
    goals = {
        "random_over_floor": measure.goal(mean / mean_floor, 1.25),
        "largest_over_floor": measure.goal(rows["largest"]["over_floor"], 1.3),
        "smallest_over_floor": measure.goal(rows["smallest"]["over_floor"], 1.3),
        "smallest_over_largest": measure.goal(median["smallest"] / median["largest"], 0.48),
        "compile_s": measure.goal(compile_s, 90),
        "compilations": measure.goal(compilations["count"], 1),
        "peak_memory_gb": measure.goal(peak / 1e9, 8),
    }
    measure.finish(result, goals)


def _compilations(space: SearchSpace, count: int) -> dict[str, int]:
    """How often XLA compiles for `count` random subnets.

    The space keeps its layers, heads and experts at a width that runs in milliseconds: the number
    of compilations does not depend on sizes, and a thousand full-size steps would take an hour.
    """
    small = dataclasses.replace(
        space, qkv_dim=32, encoder_embed_dims=(32, 40), decoder_embed_dims=(32, 40),
        encoder_ffn_dims=(16, 32, 48), decoder_ffn_dims=(16, 32, 48),
    )  # fmt: skip
    target, config = TrainingTarget(small, (64, 64), ModelConfig()), TrainingConfig()
    step = Step(target, config, masked=False)
    state = parallel.replicate(initial_state(target, config, 0))
    ids = np.full((1, 1, 2, 5), 7, np.int32)
    batch = {"source": ids, "target": ids}
    seen = 0

    def listen(event: str, duration_secs: float, **kwargs: str | int):
        nonlocal seen
        seen += event == "/jax/core/compile/backend_compile_duration"

    subnets = {small.sample(np.random.default_rng(i)) for i in range(count)}
    jax.monitoring.register_event_duration_secs_listener(listen)
    for subnet in subnets:
        state, out = step.jitted(state, batch, subnet)
    jax.block_until_ready(out)
    return {"subnets": len(subnets), "count": seen}


if __name__ == "__main__":
    main()
