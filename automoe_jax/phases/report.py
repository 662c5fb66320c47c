"""The report: largest, smallest, random and searched subnet side by side."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import Subnet, from_json, short_name, to_json
from automoe_jax.config import RunConfig
from automoe_jax.data.tokens import PreparedData
from automoe_jax.decoding import evaluation
from automoe_jax.decoding.translator import Translator
from automoe_jax.latency.breakdown import parts_ms
from automoe_jax.latency.process import Timer
from automoe_jax.latency.statistics import ratio, summarise
from automoe_jax.model.extract import Params
from automoe_jax.phases import routing
from automoe_jax.phases.export import SupernetExporter, add_scores, export_params
from automoe_jax.phases.prepare import corpus_split
from automoe_jax.phases.run import EXPORT, REPORT, SEARCH, SUBNET, Run
from automoe_jax.phases.search_history import ScoreHistory
from automoe_jax.phases.weights import origin, subnet_params
from automoe_jax.published.subnet_files import load
from automoe_jax.report import page
from automoe_jax.search import sensitivity
from automoe_jax.search.sensitivity import Worth
from automoe_jax.system import files
from automoe_jax.training.checkpoints import latest_step

RESULTS = "results.json"
RANDOM, RANDOM_SUBNET = "random within the limit", f"{SUBNET}/random"  # its name and folder
MOST_REPEATS = 4  # of a word or a sign in a row
N_EXAMPLES = 10
PARTS_RUNS = 50  # of each part of a translation; the whole is timed by the protocol
ROUTED_PAIRS = 1000  # test pairs whose tokens are counted by expert

_Scored = tuple[evaluation.Scores, list[str]]  # of a model, with its translations


def beam_size(config: RunConfig) -> int:
    """The beam size for BLEU: that of latency if the export has it, else its largest."""
    sizes = config.export.beam_sizes
    return config.latency.beam_size if config.latency.beam_size in sizes else max(sizes)


def compare(run: Run, params: Params, searched: Subnet, found: dict[str, Any]) -> dict[str, Any]:
    """Measures subnets with weights of the supernet `params`, and the trained one on test text.

    `searched` is the architecture of `export/`, `found` the result of the search. Returns the
    content of `results.json`, without the phases' times.
    """
    config = run.config
    subnets = {"largest": config.space.largest(), "smallest": config.space.smallest()}
    if found["random"]["first"] is not None:
        subnets[RANDOM] = from_json(found["random"]["first"])
    subnets["searched"] = searched
    test = evaluation.read_split(corpus_split(run, "test"), config.pipeline.test_sentences)
    exports = run.path / REPORT / ".exports"
    rows, threads = _compare_inherited(run, params, subnets, test, exports)
    export = run.path / EXPORT
    translator = Translator.load(export)
    scores, translations = evaluation.evaluate(translator, *test, beam_size(config))
    add_scores(export, {"test": dataclasses.asdict(scores)})
    trained = {"searched": (scores, translations), **_random_trained(run, test, exports)}
    lowercase = translator.tokenizer is not None and translator.tokenizer.lowercase
    for row in rows:
        row.update(_trained_scores(trained.get(row["name"]), test[1], lowercase=lowercase))
    gain = None
    if RANDOM in trained:
        both = translations, trained[RANDOM][1]
        difference = evaluation.paired_difference(*both, test[1], lowercase=lowercase)
        gain = dataclasses.asdict(difference)
    shutil.rmtree(exports, ignore_errors=True)
    repeating = sum(evaluation.most_repeats(text) > MOST_REPEATS for text in translations)
    examples = zip(*(texts[:N_EXAMPLES] for texts in (*test, translations)), strict=True)
    return {
        "version": 1,
        "rows": rows,
        "test": dataclasses.asdict(scores),
        "gain_over_random": gain,
        "repeating": repeating,
        "most_repeats": MOST_REPEATS,
        "latency": {**dataclasses.asdict(config.latency), "threads_used": threads},
        "limits": found["limits"],
        "limit_ratio": config.search.constraint.latency_ratio or None,
        "searched_loss": next(
            best["sample_loss"]
            for best in found["best"]
            if load(run.path / SEARCH / best["file"]) == searched
        ),
        "random": {k: found["random"][k] for k in ("count", "median_loss", "best_loss")},
        "examples": [{"source": s, "reference": r, "translation": t} for s, r, t in examples],
    }


def _trained_scores(
    trained: _Scored | None, references: list[str], *, lowercase: bool
) -> dict[str, Any]:
    """The entries of a row about its subnet's own training; None where there was none."""
    if trained is None:
        return {"bleu_trained": None, "bleu_trained_95": None, "chrf_trained": None}
    scores, translations = trained
    interval = evaluation.bleu_interval(translations, references, lowercase=lowercase)
    return {
        "bleu_trained": scores.bleu, "bleu_trained_95": interval, "chrf_trained": scores.chrf,
    }  # fmt: skip


def _random_trained(
    run: Run, test: tuple[list[str], list[str]], folder: Path
) -> dict[str, _Scored]:
    """Scores and translations of the random subnet, by its name, if it was trained."""
    trained = run.path / RANDOM_SUBNET
    if not run.config.pipeline.train_random or latest_step(trained) is None:
        return {}
    params, subnet, step = subnet_params(run, RANDOM_SUBNET)
    kind = run.config.subnet_training.final_weights
    source = origin(trained, "trained subnet", step, kind)
    export_params(run, params, subnet, folder / "random_trained", source, programs=False)
    translator, beam = Translator.load(folder / "random_trained"), beam_size(run.config)
    return {RANDOM: evaluation.evaluate(translator, *test, beam)}


def _compare_inherited(
    run: Run,
    params: Params,
    subnets: dict[str, Subnet],
    test: tuple[list[str], list[str]],
    folder: Path,
) -> tuple[list[dict[str, Any]], int]:
    """The table's rows, and the number of threads that latency was measured with.

    Exports the subnets to `folder`; ratios of latency are to the first of them.
    """
    config = run.config
    exporter, beam = SupernetExporter(run, params, "supernet"), beam_size(config)
    exports = [folder / name.split()[0] for name in subnets]
    for subnet, export in zip(subnets.values(), exports, strict=True):
        exporter.export(subnet, export, sorted({beam, config.latency.beam_size}))
    run.progress.note(f"measuring latency ({config.latency.name}), all in turns")
    with Timer(config.latency.threads, config.latency.platform) as timer:
        times = timer.time(exports, config.latency)
        brief = dataclasses.replace(config.latency, runs=min(PARTS_RUNS, config.latency.runs))
        parts = [parts_ms(timer, export, brief) for export in exports]
        threads = timer.threads
    rows = []
    named = zip(subnets.items(), exports, times, parts, strict=True)
    for (name, subnet), export, own, own_parts in named:
        scores, _ = evaluation.evaluate(Translator.load(export), *test, beam)
        counts = complexity.count(subnet)
        rows.append(
            {
                "name": name,
                "architecture": short_name(subnet),
                "subnet": to_json(subnet),
                "params": counts.params,
                "active_params": counts.active_params,
                "flops": counts.flops,
                "latency": dataclasses.asdict(summarise(own)),
                "latency_ratio": list(ratio(own, times[0])),
                "parts_ms": own_parts,
                "bleu_inherited": scores.bleu,
            }
        )
        run.progress.note(f"{name}: BLEU with inherited weights {scores.bleu:.2f}")
    return rows, threads


def routing_of(run: Run, data: PreparedData, trained: str) -> dict[str, Any]:
    """Of `routing.json` of the trained subnet in a folder, on test text; and the picture."""
    params, subnet, step = subnet_params(run, trained)
    source = origin(
        run.path / trained, "trained subnet", step, run.config.subnet_training.final_weights
    )
    where = run.path / REPORT
    found = routing.analyse(run, data, params, subnet, source, where, ROUTED_PAIRS, "test")
    return {
        "routing": found["layers"],
        "routing_losses": found["losses"],
        "computation": found["computation"],
    }


def _worths(lines: list[dict[str, Any]], cost: str) -> Sequence[Worth]:
    """What each choice of a side is worth by a search's scored subnets; () if they are too few."""
    subnets = [from_json(line["subnet"]) for line in lines]
    costs = [line["costs"][cost] for line in lines]
    try:
        return sensitivity.analyse(subnets, [line["loss"] for line in lines], costs).sides
    except ValueError:
        return ()


def write(run: Run, results: dict[str, Any], found: dict[str, Any]):
    """Writes the page, its picture and, last, `results.json`."""
    folder, lines = run.path / REPORT, ScoreHistory(run.path / SEARCH).lines
    page.write(folder, results, lines, found, _worths(lines, found["over"][0]))
    files.write_json(folder / RESULTS, results)
