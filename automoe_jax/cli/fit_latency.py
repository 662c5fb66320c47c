r"""Makes a latency model of this machine, which a search predicts latencies with.

python launch/fit_latency.py --config configs/multi30k.py --workdir runs/multi30k
python launch/fit_latency.py --config configs/wmt14.py --random_weights --vocab_size=32768 \
    --workdir runs/latency
python launch/fit_latency.py --table=wmt14ende_cpu_xeon_all.csv --out=xeon.json

Times config.predictor.subnets exports, fits the model to them, and measures its error on
config.predictor.held_out others. With --table it is fitted to a CSV of HAT's instead.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases.export import SupernetExporter
from automoe_jax.phases.latency_model import fit_latency_model
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import CACHE, LATENCY_MODEL, hold
from automoe_jax.phases.weights import random_weights, supernet_params
from automoe_jax.predictor import features, tables
from automoe_jax.predictor.model import LatencyModel
from automoe_jax.system import compile_cache
from automoe_jax.system.errors import UserError

CONFIG = RunFlags()
_OUT = flags.DEFINE_string(
    "out", None, "file to write (default: latency_model.json in the workdir, where searches look)"
)
_RANDOM = flags.DEFINE_bool("random_weights", False, "an untrained supernet is enough for timing")
_VOCAB = flags.DEFINE_integer(
    "vocab_size", None, "with --random_weights, words of both languages: no corpus is then needed"
)
_TABLE = flags.DEFINE_string("table", None, "CSV of measured latencies, in the columns of HAT's")
_SEED = flags.DEFINE_integer("seed", 0, "of the table's split")
_HELD_OUT = flags.DEFINE_float("held_out", 0.2, "share of the table's rows that test the model")
_JSON = options.define_json()


def main():
    options.refuse_beside(_TABLE, _RANDOM, _VOCAB)
    if _TABLE.value is not None:
        _fit_table(_TABLE.value)
        return
    for flag in (_SEED, _HELD_OUT):
        if flag.present:
            raise UserError(f"--{flag.name} is of a table's split: it goes with --table")
    config = CONFIG.load()
    if _VOCAB.value is not None and (not _RANDOM.value or _VOCAB.value < 8):
        raise UserError(
            f"--vocab_size is {_VOCAB.value}; it goes with --random_weights and is at least 8"
        )
    if _VOCAB.value is None:
        run = CONFIG.open_run(config)
        vocab_sizes = prepare(run).tokenizer.vocab_sizes
    else:
        run, vocab_sizes = CONFIG.run(config), (_VOCAB.value, _VOCAB.value)
        hold(run)
        compile_cache.enable_for_run(run.path / CACHE)
    if _RANDOM.value:
        params = random_weights(config, vocab_sizes)
    else:
        params, _ = supernet_params(run, vocab_sizes)
        params = jax.tree.map(np.asarray, params)
    path = Path(_OUT.value) if _OUT.value else run.path / LATENCY_MODEL
    exporter = SupernetExporter(run, params, "timing")
    model = fit_latency_model(run, exporter, vocab_sizes, path)
    about = {"file": str(path), **_about(model)}
    if _JSON.value:
        terminal.print_json(about)
        return
    _show(about)
    assert model.task is not None
    largest = zip(features.WORK, features.work(config.space.largest(), model.task), strict=True)
    costs = {name: model.coefficients[name] * x for name, x in largest}
    rows = ((name, f"{ms:.2f}") for name, ms in costs.items() if ms > 0)
    terminal.print_table(("of the latency", "ms for the largest subnet"), rows)


def _fit_table(path: str):
    if not _OUT.value:
        raise UserError("--out is missing; name the file for the model, as --out=xeon.json")
    model, ordinary = tables.fit(path, _SEED.value, _HELD_OUT.value)
    model.save(Path(_OUT.value))
    about = {"file": _OUT.value, **_about(model)}
    about["least_squares"] = {"rmse_ms": ordinary.rmse, "mape": ordinary.mape}
    if _JSON.value:
        terminal.print_json(about)
        return
    _show(about)
    print(
        f"ordinary least squares on the same rows: {ordinary.mape:.2f} % mean absolute, "
        f"{ordinary.rmse:.2f} ms root mean squared"
    )


def _about(model: LatencyModel) -> dict[str, Any]:
    e = model.error
    error = {"count": e.count, "mape": e.mape, "worst": e.worst, "rmse_ms": e.rmse, "tau": e.tau}
    return {"made_for": model.made_for, "fitted": model.fitted, "held_out": error}


def _show(about: dict[str, Any]):
    error = about["held_out"]
    tau = "unknown" if error["tau"] is None else f"{error['tau']:.3f}"
    print(f"{about['file']}: fitted to {about['fitted']} latencies")
    print(f"made for: {', '.join(f'{k} {v}' for k, v in about['made_for'].items())}")
    print(
        f"error on {error['count']} held out: {error['mape']:.2f} % mean absolute, "
        f"{error['worst']:.1f} % at worst, {error['rmse_ms']:.2f} ms root mean squared, "
        f"Kendall's tau {tau}"
    )
