"""Makes a latency model: times chosen subnets, fits, and measures its error on others."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet, to_json
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.kernels import kernels_used
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.prober import ExportForTiming, Prober
from automoe_jax.latency.process import thread_count
from automoe_jax.latency.records import LATENCY, MEASUREMENTS, Measured, ReplayLog, measured_of
from automoe_jax.latency.statistics import reference_scale
from automoe_jax.predictor import design, features, regression
from automoe_jax.predictor.config import PredictorConfig
from automoe_jax.predictor.features import TranslationTask
from automoe_jax.predictor.model import WORK, LatencyModel
from automoe_jax.predictor.scores import agreement
from automoe_jax.system import machine
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress
from automoe_jax.system.version import __version__

# Relative error not visible in run-to-run variance (memory layout).
LAYOUT_NOISE = 0.015
_INTERVAL = 3.92  # width of a 95 % interval in standard deviations


def task_of(config: LatencyConfig, vocab_size: int, quantize: str) -> TranslationTask:
    """The translation task that latencies are measured on."""
    lengths, beam = (config.source_length, config.target_length), config.beam_size
    weight_bytes = 1 if quantize == "int8" else 4
    return TranslationTask(*lengths, beam, vocab_size, weight_bytes, machine.cache_bytes())


def made_for(config: LatencyConfig) -> dict[str, Any]:
    """The machine and versions that a latency measured here is valid for."""
    return {
        "cpu": machine.cpu_name(),
        "threads": thread_count(config.threads),
        "platform": config.platform,
        "kernels": kernels_used(config),
        "jax": importlib.metadata.version("jax"),
        "automoe_jax": __version__,
    }


def fit(
    space: SearchSpace,
    latency: LatencyConfig,
    config: PredictorConfig,
    task: TranslationTask,
    write: ExportForTiming,
    folder: Path,
    progress: Progress,
    seed: int = 0,
) -> LatencyModel:
    """Times `config.subnets` + `config.held_out` subnets and fits a model.

    The protocol is `latency` with `config.runs` runs; `write` makes exports of `task`. Measurements
    are kept in `folder/measurements.jsonl`: a fit that was killed continues. `seed` is that of the
    choice of subnets. `UserError` if the space has too few.
    """
    train = design.choose(space, task, config.subnets, seed)
    test = design.unseen(space, config.held_out, train, seed)
    if len(train) < config.subnets or len(test) < config.held_out:
        raise UserError(
            f"the space has too few subnets for {config.subnets} + {config.held_out}: time them "
            "all with search.latency=gold, or ask for fewer with predictor.subnets and "
            "predictor.held_out"
        )
    reference, policy = space.smallest(), MeasurementPolicy(runs=config.runs)
    prober = Prober(latency, policy, write, reference, folder / ".timing")
    log = ReplayLog(folder / MEASUREMENTS)
    try:
        measured = measure_all([*train, *test], reference, prober, policy.group, log, progress)
    finally:
        prober.close()
    others = [m.reference for s, m in measured.items() if s != reference]
    scale = reference_scale(measured[reference].ms, others)
    values = {s: (scale * m.ms, scale * (m.high - m.low) / _INTERVAL) for s, m in measured.items()}
    y_N, deviation_N = np.array([values[s] for s in train]).T
    x_NF = np.array([features.work(s, task) for s in train])
    deviation_N = np.hypot(deviation_N, LAYOUT_NOISE * y_N)
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
    prober: Prober,
    group_size: int,
    log: ReplayLog,
    progress: Progress,
) -> dict[Subnet, Measured]:
    """The measurement of each subnet and of the reference; those in `log` are not repeated."""
    first = log.get(LATENCY, reference, lambda: prober.measure_reference().fields())
    known = log.stored(LATENCY)
    missing = [s for s in subnets if s not in known]
    task = progress.task("timing subnets", len(subnets))
    for start in range(0, len(missing), group_size):
        group = missing[start : start + group_size]
        for subnet, m in zip(group, prober.measure_group(group, first["value"]), strict=True):
            log.get(LATENCY, subnet, m.fields)
        task.update(len(subnets) - len(missing) + start + len(group))
    task.close()
    known = log.stored(LATENCY)
    return {s: measured_of(known[s]) for s in dict.fromkeys([reference, *subnets])}
