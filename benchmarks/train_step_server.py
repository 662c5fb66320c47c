"""Full-size train steps of one checkout, on request; a child process of before_after.py.

python benchmarks/train_step_server.py CHECKOUT

The checkout's own benchmarks/train_step.py makes and compiles the step. A request names a subnet of
it, as {"subnet": "largest"}; the answer is the seconds of one step.
"""

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from child import serve


def full_size(benchmark: Any) -> Any:
    """`train_step.full_size()`, also of commits (as 39192b6) that have it in `main`."""
    if hasattr(benchmark, "full_size"):
        return benchmark.full_size()
    space, config, words = benchmark.SearchSpace(), benchmark.TrainingConfig(), 32768
    make_target = getattr(benchmark, "TrainingTarget", None) or benchmark.Trained
    target = make_target(space, (words, words), benchmark.ModelConfig())
    rng = np.random.default_rng(0)
    ids = rng.integers(4, words, (1, 1, 68, 30)).astype(np.int32)
    batch = {"source": ids, "target": rng.permuted(ids, axis=-1)}
    batch["target"][..., -1] = 2
    subnets = {"largest": space.largest()}
    subnets |= {f"random_{i}": space.sample(np.random.default_rng(i)) for i in range(5)}
    state = benchmark.loop.initial_state(target, config, 0)
    state = benchmark.parallel.replicate(state, consume=True)
    return SimpleNamespace(target=target, config=config, state=state, batch=batch, subnets=subnets)


def main():
    """Serves until stdin ends."""
    sys.path[0] = str(Path(sys.argv[1]) / "benchmarks")  # in place of this file's folder
    train_step = importlib.import_module("train_step")
    if hasattr(train_step, "process"):
        prepare = train_step.process.prepare
        (flag,) = inspect.signature(prepare).parameters  # earlier commits: huge_pages
        prepare(**{flag: True})
    else:  # of 39192b6
        train_step.huge_pages.use()
    problem = full_size(train_step)
    step = train_step.Step(problem.target, problem.config, masked=False)
    state, batch, subnets = problem.state, problem.batch, problem.subnets
    step.compile(state, batch, subnets["largest"])

    def seconds(request: dict[str, Any]) -> float:
        nonlocal state
        state, _, seconds = step(state, batch, subnets[request["subnet"]])
        return seconds

    serve(seconds)


if __name__ == "__main__":
    main()
