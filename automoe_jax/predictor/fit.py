"""Makes a latency model: times chosen subnets, fits, and measures its error on others."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet, to_json
from automoe_jax.latency import subnet_timer as timing
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.kernels import kernels_used
from automoe_jax.latency.process import available_cpus
from automoe_jax.latency.records import History
from automoe_jax.latency.subnet_timer import GROUP, ExportForTiming, SubnetTimer
from automoe_jax.predictor import design, features, regression
from automoe_jax.predictor.config import PredictorConfig
from automoe_jax.predictor.features import Task
from automoe_jax.predictor.model import WORK, LatencyModel
from automoe_jax.predictor.scores import agreement
from automoe_jax.system import machine
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress
from automoe_jax.system.version import __version__

LATENCY = "latency_ms"
# What a latency is off by although its runs agree: subnets lie differently in memory.
OTHER_NOISE = 0.015


def task_of(config: LatencyConfig, vocab_size: int, quantize: str) -> Task:
    """What is timed here."""
    return Task(
        config.source_length,
        config.target_length,
        config.beam_size,
        vocab_size,
        1 if quantize == "int8" else 4,
        machine.cache_bytes(),
    )


def made_for(config: LatencyConfig) -> dict[str, Any]:
    """What a latency measured here belongs to."""
    return {
        "cpu": machine.cpu_name(),
        "threads": config.threads or len(available_cpus()),
        "platform": config.platform,
        "kernels": kernels_used(config),
        "jax": importlib.metadata.version("jax"),
        "automoe_jax": __version__,
    }


def fit(
    space: SearchSpace,
    latency: LatencyConfig,
    config: PredictorConfig,
    task: Task,
    write: ExportForTiming,
    folder: Path,
    progress: Progress,
    seed: int = 0,
) -> LatencyModel:
    """Times `config.subnets` + `config.held_out` subnets and fits a model.

    What was measured is kept in `folder/measurements.jsonl`: a fit that was killed goes on.

    Args:
      space: the subnets to be able to predict.
      latency: the protocol; `config.runs` in place of its runs.
      config: how many.
      task: of the exports that `write` makes.
      write: exports a subnet for timing.
      folder: for measurements.
      progress: told of it.
      seed: of the choice of subnets.

    Raises:
      UserError: the space has too few subnets to fit anything to.
    """
    train = design.choose(space, task, config.subnets, seed)
    test = design.unseen(space, config.held_out, train, seed)
    if len(train) < config.subnets or len(test) < config.held_out:
        raise UserError(
            f"the space has too few subnets for {config.subnets} + {config.held_out}: time them "
            "all with search.latency=gold, or ask for fewer with predictor.subnets and "
            "predictor.held_out"
        )
    history = History(folder)
    reference = space.smallest()
    values = measure_all([*train, *test], reference, latency, config.runs, write, history, progress)
    others = [history.about(LATENCY, s) for s in values if s != reference]
    speed = timing.speed(values[reference][0], [line["reference"] for line in others])
    values = {s: (speed * ms, speed * deviation) for s, (ms, deviation) in values.items()}
    y_N, deviation_N = np.array([values[s] for s in train]).T
    x_NF = np.array([features.work(s, task) for s in train])
    deviation_N = np.hypot(deviation_N, OTHER_NOISE * y_N)
    coefficients = regression.non_negative(x_NF, y_N, deviation_N)
    predicted = np.array([features.work(s, task) for s in test]) @ coefficients
    return LatencyModel(
        kind=WORK,
        coefficients=dict(zip(features.WORK, coefficients.tolist(), strict=True)),
        task=task,
        made_for=made_for(latency),
        error=agreement(predicted, [values[s][0] for s in test]),
        fitted=len(train),
        reference={"subnet": to_json(reference), "ms": values[reference][0]},
    )


def measure_all(
    subnets: list[Subnet],
    reference: Subnet,
    latency: LatencyConfig,
    runs: int,
    write: ExportForTiming,
    history: History,
    progress: Progress,
) -> dict[Subnet, tuple[float, float]]:
    """(latency in ms, its standard deviation) of each; what `history` knows is not timed again."""
    known = history.value(LATENCY, reference)
    missing = [s for s in subnets if history.value(LATENCY, s) is None and s != reference]
    if missing or known is None:
        folder = history.folder / ".timing"
        first = known[0] if known else None
        timer = SubnetTimer(latency, runs, write, reference, first, folder)
        task = progress.task("timing subnets", len(subnets))
        try:
            if known is None:
                history.measured(LATENCY, reference, timer.reference_ms, timer.how)
            for start in range(0, len(missing), GROUP):
                group = missing[start : start + GROUP]
                for subnet, m in zip(group, timer.measure_all(group), strict=True):
                    history.measured(
                        LATENCY, subnet, m.ms, timer.how,
                        low=m.low, high=m.high, reference=m.reference,
                    )  # fmt: skip
                task.update(len(subnets) - len(missing) + start + len(group))
        finally:
            task.close()
            timer.close()
    return {s: _known(history.about(LATENCY, s)) for s in subnets}


def _known(line: dict[str, Any]) -> tuple[float, float]:
    """(latency, standard deviation) of a record; the reference has none."""
    return line["value"], (line["high"] - line["low"]) / 3.92 if "high" in line else 0.0
