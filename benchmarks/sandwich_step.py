"""An update with the sandwich rule and in-place distillation, beside one of plain sampling.

python benchmarks/sandwich_step.py --json          # 5 minutes on 2 cores

The supernet of configs/msdocs.py with its updates' tokens. Every update runs the same four subnets,
the largest, the smallest and two random ones: a plain one each on a quarter of the tokens (four
micro-batches), a sandwich all four on one micro-batch of a quarter, so that passes, tokens of a
pass and FLOPs are equal; without and with distillation from the largest one's predictions. Timed in
turns. The last line is JSON; the exit code is 1 where the goal is missed.
"""

import argparse
import runpy
from typing import Any

import jax
import measure
import numpy as np
from trainings import ROOT

from automoe_jax.cli import process
from automoe_jax.config import resolve
from automoe_jax.data.batches import Share
from automoe_jax.training import parallel, sampling
from automoe_jax.training.config import SamplingConfig
from automoe_jax.training.sharding import Layout
from automoe_jax.training.steps import mapped_step
from automoe_jax.training.target import TrainingTarget, initial_state

CONFIG = "configs/msdocs.py"
PASSES = 4
RATIO = 1.15
SANDWICH = {"rule": "sandwich", "sandwich": PASSES}
VARIANTS = {
    "plain": SamplingConfig(),
    "sandwich": SamplingConfig(**SANDWICH),
    "sandwich, distillation": SamplingConfig(**SANDWICH, distillation=0.5),
}


def batch(rng: np.random.Generator, n_micro: int, rows: int, length: int, vocab: int) -> Any:
    """Random ids (device, micro-batch, row, time), eos last."""
    ids = rng.integers(4, vocab, (1, n_micro, rows, length)).astype(np.int32)
    ids[..., -1] = 2
    return {"source": ids, "target": rng.permuted(ids, axis=-2)}


def main():
    process.prepare(compiling=True)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=16, help="tokens of a sentence")
    parser.add_argument("--runs", type=int, default=15, help="timed updates of each kind")
    parser.add_argument(
        "--json", action="store_true", help="accepted; the output is JSON in any case"
    )
    args = parser.parse_args()
    config = resolve(runpy.run_path(str(ROOT / CONFIG))["get_config"]())
    space, vocab = config.space, config.tokenizer.vocab_size
    target = TrainingTarget(space, (vocab, vocab), config.model)
    subnets = [space.largest(), space.smallest()]
    subnets += [space.sample(np.random.default_rng(i)) for i in range(PASSES - len(subnets))]
    active = sampling.stack([subnets], target.hull, Share(0, 1, 1))
    rows = config.training.tokens_per_batch // (PASSES * args.length)
    rng, key = np.random.default_rng(0), jax.random.key(0)
    programs, states = {}, {}
    for name, own in VARIANTS.items():
        n_micro = PASSES if name == "plain" else 1
        step = mapped_step(target, config.training, own)
        given = batch(rng, n_micro, rows, args.length, vocab), active, key
        states[name] = parallel.place(initial_state(target, config.training, 0), Layout())
        compiled = step.lower(states[name], *given).compile()

        def update(name: str = name, compiled: Any = compiled, given: Any = given):
            states[name], metrics = compiled(states[name], *given)
            return metrics

        programs[name] = update
    times = measure.interleaved(programs, args.runs)
    ratios = {
        name: measure.spread(np.divide(own, times["plain"]).tolist()) for name, own in times.items()
    }
    seconds = {name: measure.spread(own) for name, own in times.items()}
    about = {"tokens_of_a_pass": rows * args.length, "seconds": seconds, "against_plain": ratios}
    cost = ratios["sandwich, distillation"]["median"]
    goals = {"sandwich and distillation against plain": measure.goal(cost, RATIO)}
    measure.finish({"benchmark": "sandwich_step", **measure.machine(), **about}, goals)


if __name__ == "__main__":
    main()
