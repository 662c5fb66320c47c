"""A page that compares what several runs, or the parts of a study, came to."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from automoe_jax.architecture.subnet import from_json
from automoe_jax.decoding.manifest import read_manifest
from automoe_jax.decoding.schema import KERNELS_OF
from automoe_jax.phases.report import RESULTS
from automoe_jax.phases.run import EXPORT, REPORT
from automoe_jax.report import comparison, curves
from automoe_jax.report.page import ROUTED
from automoe_jax.report.systems import (
    PRECISIONS,
    Interval,
    PairedDifference,
    PrecisionScores,
    Row,
)
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.training import metrics

_PART = ("name", "budget", "seed")


def compare(sources: Sequence[Path], folder: Path, title: str) -> list[Row]:
    """Writes the page of workdirs of pipelines and result files of benchmarks/paper_tables.py.

    Returns its rows. `UserError` if a source is neither, or none has a trained model.
    """
    rows: list[Row] = []
    examples: dict[str, Sequence[dict[str, str]]] = {}
    trainings: dict[str, curves.Lines] = {}
    studies: dict[str, Sequence[Row]] = {}
    uses: dict[str, tuple[dict[str, Any], Path]] = {}
    files_given = [source for source in sources if source.is_file()]
    for source in sources:
        if source.is_file():
            own, found = of_study(source)
            name = _name(source, files_given)
            studies[name] = own
            study = name.removesuffix(".jsonl") if len(files_given) > 1 else ""
            rows += [dataclasses.replace(row, study=study) for row in own]
            examples[study] = found
        elif (source / REPORT / RESULTS).exists():
            name = _name(source, sources)
            results = files.read_json(source / REPORT / RESULTS, "report")
            rows += _of_run(source, name, results)
            uses[name] = results, source / REPORT / ROUTED
            for path in sorted(source.rglob(metrics.NAME)):
                trainings[str(path.parent)] = metrics.read(path.parent)
        else:
            raise UserError(
                f"{source} is neither the workdir of a finished pipeline nor a result file of "
                "benchmarks/paper_tables.py; give one of them"
            )
    if not rows:
        raise UserError(f"{', '.join(map(str, sources))}: no model is finished there yet")
    comparison.write(folder, title, rows, examples, trainings, studies, uses)
    return rows


def _name(path: Path, others: Sequence[Path]) -> str:
    """The last parts of a path that no other one has."""
    parts, rest = path.resolve().parts, [other.resolve().parts for other in others]
    n = 1
    while n < len(parts) and sum(parts[-n:] == other[-n:] for other in rest) > 1:
        n += 1
    return "/".join(parts[-n:])


def of_study(path: Path) -> tuple[list[Row], list[dict[str, str]]]:
    """The models of a result file of benchmarks/paper_tables.py, and the sentences that they
    translated as examples. `UserError` if it is none.
    """
    parts: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    lines = files.parse_json_lines(path)
    try:
        for line in lines:
            parts.setdefault(line["kind"], {})[tuple(line[name] for name in _PART)] = line
        models = {
            key: _of_part(line, *(parts.get(kind, {}).get(key) for kind in ("latency", "search")))
            for key, line in parts.get("model", {}).items()
        }
        differences = _differences(parts.get("difference", {}).values(), models)
        rows = [
            dataclasses.replace(row, differences=differences.get(key, {}))
            for key, row in models.items()
        ]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path} is no result file of benchmarks/paper_tables.py: {type(e).__name__} {e}"
        ) from None
    shown = [*parts.get("teacher", {}).values(), *parts.get("model", {}).values()]
    return rows, next((line["examples"] for line in shown if "examples" in line), [])


def _of_part(
    line: dict[str, Any], latency: dict[str, Any] | None, search: dict[str, Any] | None
) -> Row:
    measured = {}
    for precision in PRECISIONS:
        scores, times = line[precision], (latency or {}).get(precision, {})
        share = times.get("of_reference")
        measured[precision] = PrecisionScores(
            (scores["bleu"], *scores["bleu_95"]), scores["chrf"], times.get("ms"),
            None if share is None else _interval(share),
        )  # fmt: skip
    # The project's kernels do not have all cells.
    slower = "native" not in KERNELS_OF[from_json(line["subnet"]).cell]
    name = f"{line['name']}, on XLA's operations" if slower else line["name"]
    tests = line["fp32"].get("tests", {})
    return Row(
        name, f"{line['budget']:g}" if line["budget"] else "", line["seed"],
        line["subnet"], line["params_m"], line["active_params_m"], line["gflops"], measured,
        line["seconds"] / 3600, None if search is None else search["seconds"] / 60,
        tuple(line.get("translations", ())),
        _means((latency or {}).get("fp32", {})),
        {test: own["bleu"] for test, own in tests.items() if test != "test"},
        line.get("loss"), {int(step): loss for step, loss in line.get("losses", {}).items()},
    )  # fmt: skip


def _differences(
    lines: Iterable[dict[str, Any]], models: dict[tuple[Any, ...], Row]
) -> dict[tuple[Any, ...], dict[str, PairedDifference]]:
    """Of each model from others that are there, by these others' labels."""
    found: dict[tuple[Any, ...], dict[str, PairedDifference]] = {}
    for line in lines:
        own, other = (tuple(line[x][part] for part in _PART) for x in ("ours", "other"))
        if other in models:
            losses = line["inherited"]
            found.setdefault(own, {})[models[other].label] = PairedDifference(
                _interval(line["bleu"]), _interval(line["latency_ratio"]),
                None if losses is None else losses[1] - losses[0],
            )  # fmt: skip
    return found


def _interval(values: Sequence[float]) -> Interval:
    value, low, high = values
    return value, low, high


def _means(timed: dict[str, Any]) -> dict[str, float]:
    """What each part of a translation takes, without intervals; {} where it was not timed."""
    return {part: value for part, (value, _, _) in timed.get("parts_ms", {}).items()}


def _of_run(run: Path, name: str, results: dict[str, Any]) -> list[Row]:
    """The trained subnets in the report of a pipeline.

    Without the share of the reference's latency: each run has a reference of its own, its largest
    subnet.
    """
    int8 = read_manifest(run / EXPORT)["quantization"] == "int8"
    rows = []
    for own in results["rows"]:
        searched = own["name"] == "searched"
        bleu = results["test"]["bleu"] if searched else own.get("bleu_trained")
        if bleu is None:
            continue
        chrf = results["test"]["chrf"] if searched else own["chrf_trained"]
        low, high = own.get("bleu_trained_95") or (None, None)  # earlier versions have none
        scores = PrecisionScores((bleu, low, high), chrf, own["latency"]["mean_ms"])
        rows.append(
            Row(
                f"{name}: {own['name']}", "", 0, own["subnet"], own["params"] / 1e6,
                own["active_params"] / 1e6, own["flops"] / 1e9,
                {"int8" if int8 else "fp32": scores}, parts_ms={} if int8 else _means(own),
            )
        )  # fmt: skip
    return rows
