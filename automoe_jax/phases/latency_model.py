"""The run's latency model: loads it, or times subnets and fits it."""

import dataclasses
import shutil
from pathlib import Path

from automoe_jax.config import RunConfig
from automoe_jax.latency.records import MEASUREMENTS
from automoe_jax.phases.export import SupernetExporter
from automoe_jax.phases.run import LATENCY_MODEL, Run, claim
from automoe_jax.predictor import fit
from automoe_jax.predictor import model as predictor_model
from automoe_jax.predictor.model import LatencyModel
from automoe_jax.system.errors import UserError


def latency_model(
    run: Run, exporter: SupernetExporter, vocab_sizes: tuple[int, int]
) -> LatencyModel:
    """The latency model that the config names, or the run's, which is fitted if it is missing.

    `UserError` if the model is for another protocol than the config's.
    """
    config = run.config
    path = Path(config.search.latency_model or run.path / LATENCY_MODEL)
    if not path.exists() and not config.search.latency_model:
        fit_latency_model(run, exporter, vocab_sizes, path)
    model = read(path, config, vocab_sizes)
    for line in model.warnings(fit.made_for(config.latency)):
        run.progress.note(f"warning: {line}")
    run.progress.note(f"latency model {path}: {model.how}")
    return model


def read(path: Path, config: RunConfig, vocab_sizes: tuple[int, int]) -> LatencyModel:
    """The latency model in a file; `UserError` if it is for another protocol than the config's."""
    model = predictor_model.load(path)
    wanted = fit.task_of(config.latency, vocab_sizes[1], config.export.quantize)
    # The cache size belongs to the machine; a different machine is only warned about.
    found = model.task and dataclasses.replace(model.task, cache_bytes=wanted.cache_bytes)
    if found not in (None, wanted):
        raise UserError(
            f"{path} is a latency model of {model.task}, and the config asks for {wanted}; fit "
            "another one with launch/fit_latency.py"
        )
    return model


def fit_latency_model(
    run: Run, exporter: SupernetExporter, vocab_sizes: tuple[int, int], path: Path
) -> LatencyModel:
    """Times subnets, fits a model and writes it.

    Measurements are kept beside `path`: a killed fit continues. If the model exists already,
    everything is timed again.
    """
    config = run.config
    folder = path.with_suffix(".measurements")
    if path.exists():
        shutil.rmtree(folder, ignore_errors=True)
    task = fit.task_of(config.latency, vocab_sizes[1], config.export.quantize)
    settings = {
        **config.groups("space", "latency", "predictor", "seed"),
        "task": dataclasses.asdict(task),
        "made_for": fit.made_for(config.latency),
    }
    begun = (folder / MEASUREMENTS).exists()
    claim(run, folder.absolute(), "latency measurements", settings, begun=begun)
    count = config.predictor.subnets + config.predictor.held_out
    run.progress.note(f"making a latency model of this machine: {count} subnets are timed")
    model = fit.fit(
        config.space, config.latency, config.predictor, task, exporter.export_for_timing, folder,
        run.progress, config.seed,
    )  # fmt: skip
    model.save(path)
    return model
