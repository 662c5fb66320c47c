"""A page that compares what several runs, or the parts of a study, came to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.phases.run import REPORT
from automoe_jax.report import comparison, curves
from automoe_jax.report.comparison import Measured, Row
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.training import metrics

_RESULTS = "results.json"  # of a pipeline
_PART = ("name", "budget", "seed")


def compare(sources: Sequence[Path], folder: Path, title: str) -> list[Row]:
    """Writes the page of workdirs of pipelines and result files of benchmarks/paper_tables.py.

    Returns its rows. `UserError` if a source is neither, or none has a trained model.
    """
    rows: list[Row] = []
    examples: list[dict[str, str]] = []
    trainings: dict[str, curves.Lines] = {}
    for source in sources:
        if source.is_file():
            own, found = _of_study(source)
            rows += own
            examples = examples or found
        elif (source / REPORT / _RESULTS).exists():
            rows += _of_run(source)
            for path in sorted(source.rglob(metrics.NAME)):
                trainings[str(path.parent)] = metrics.read(path.parent)
        else:
            raise UserError(
                f"{source} is neither the workdir of a finished pipeline nor a result file of "
                "benchmarks/paper_tables.py; give one of them"
            )
    if not rows:
        raise UserError(f"{', '.join(map(str, sources))}: no model is finished there yet")
    comparison.write(folder, title, rows, examples, trainings)
    return rows


def _of_study(path: Path) -> tuple[list[Row], list[dict[str, str]]]:
    """The models of a result file, and the sentences that they translated as examples."""
    parts: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    try:
        for line in files.read_json_lines(path):
            parts.setdefault(line["kind"], {})[tuple(line[name] for name in _PART)] = line
        rows = [
            _of_part(line, parts.get("latency", {}).get(key))
            for key, line in parts.get("model", {}).items()
        ]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path} is no result file of benchmarks/paper_tables.py: {type(e).__name__} {e}"
        ) from None
    teachers = parts.get("teacher", {}).values()
    return rows, next((line["examples"] for line in teachers if "examples" in line), [])


def _of_part(line: dict[str, Any], latency: dict[str, Any] | None) -> Row:
    measured = {}
    for precision in comparison.PRECISIONS:
        scores, times = line[precision], (latency or {}).get(precision, {})
        share = times.get("of_reference")
        measured[precision] = Measured(
            (scores["bleu"], *scores["bleu_95"]), scores["chrf"], times.get("ms"),
            None if share is None else (share[0], share[1], share[2]),
        )  # fmt: skip
    return Row(
        line["name"], f"{line['budget']:g}" if line["budget"] else "", line["seed"],
        line["subnet"], line["params_m"], line["active_params_m"], line["gflops"], measured,
        line["seconds"] / 3600, tuple(line.get("translations", ())),
    )  # fmt: skip


def _of_run(run: Path) -> list[Row]:
    """The trained subnets in the report of a pipeline."""
    results = files.read_json(run / REPORT / _RESULTS, "report")
    rows = []
    for own in results["rows"]:
        bleu = results["test"]["bleu"] if own["name"] == "searched" else own.get("bleu_trained")
        if bleu is None:
            continue
        chrf = results["test"]["chrf"] if own["name"] == "searched" else own["chrf_trained"]
        ratio, ms = own["latency_ratio"], own["latency"]["mean_ms"]
        measured = Measured((bleu, bleu, bleu), chrf, ms, (ratio[0], ratio[1], ratio[2]))
        rows.append(
            Row(
                f"{run.name}: {own['name']}", "", 0, own["subnet"], own["params"] / 1e6,
                own["active_params"] / 1e6, own["flops"] / 1e9, {"fp32": measured},
            )
        )  # fmt: skip
    return rows
