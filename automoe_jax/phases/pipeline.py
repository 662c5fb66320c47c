"""All phases in one workdir: from parallel text to an exported translator and a report.

Each phase leaves a file when it is done and is skipped where that file is; training and search go
on from where they were. So the pipeline can be killed anywhere and started again.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import Subnet, from_json, short_name, to_json
from automoe_jax.config import RunConfig
from automoe_jax.decoding import evaluation as evaluate
from automoe_jax.decoding.translator import Translator
from automoe_jax.latency.process import Timer
from automoe_jax.latency.records import History
from automoe_jax.latency.statistics import ratio, summarise
from automoe_jax.model.extract import Params
from automoe_jax.phases import approximation, prepare, search_result
from automoe_jax.phases import run as phases
from automoe_jax.phases import search as search_phase
from automoe_jax.published.subnet_files import load
from automoe_jax.report import page
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress

REPORT = "report"
# Differences of BLEU below this are noise: the cheaper finalist is kept.
BLEU_NOISE = 0.2


def run(config: RunConfig, folder: str | Path, progress: Progress) -> dict[str, Any]:
    """Runs what is missing.

    Args:
      config: of the run.
      folder: workdir.
      progress: told of it.

    Returns:
      What `report/results.json` holds.
    """
    path = phases.open_run(config, folder)
    seconds = _Seconds(path / "seconds.json")

    with seconds("prepare"):
        data = phases.prepare_run(config, path, progress)
        if "test" not in prepare.open_splits(config.data, path):
            raise UserError(
                f"the corpus {config.data.path} has no test split, which the pipeline reports on; "
                "add test files, or run launch/train.py, search.py and export.py one by one"
            )
    report = path / REPORT
    # What the phases before do not write down themselves.
    began = (path / phases.SUBNET).exists()
    workdir.claim(report, REPORT, config.groups("export", "pipeline", "latency"), began)
    progress.note("phase 1 of 5: supernet training")
    with seconds("supernet"):
        phases.train_supernet(config, path, progress)
        params, step = phases.supernet_params(config, path, data.tokenizer.vocab_sizes)

    progress.note("phase 2 of 5: search")
    search_folder = path / phases.SEARCH
    with seconds("search"):
        phases.claim_search(config, search_folder, step)
        if not (search_folder / search_result.RESULT).exists():
            search_phase.run_search(config, path, search_folder, data, params, progress)
    found = files.read_json(search_folder / search_result.RESULT, "search result")
    finalists = [load(search_folder / best["file"]) for best in found["best"]]
    finalists = finalists[: config.pipeline.finalists]

    progress.note(f"phase 3 of 5: training {len(finalists)} finalist(s)")
    with seconds("finalists"):
        for i, subnet in enumerate(finalists, 1):
            start = path if config.pipeline.inherit else None
            phases.train_subnet(config, path, subnet, progress, start, f"{phases.SUBNET}/{i}")

    progress.note("phase 4 of 5: export")
    with seconds("export"):
        chosen = _choose(config, path, finalists, progress)

    progress.note("phase 5 of 5: report")
    if not (report / "results.json").exists():
        with seconds("report"):
            results = _compare(config, path, params, finalists[chosen], found, progress)
        results["seconds"] = seconds.values
        lines = History(search_folder).lines
        page.write(report, results, lines, found)
        files.write_json(report / "results.json", results)
    return files.read_json(report / "results.json", "report")


class _Seconds:
    """Wall time of each phase, added up over restarts."""

    def __init__(self, path: Path):
        self._path = path
        known = files.read_json(path, "timing")["seconds"] if path.exists() else {}
        self.values: dict[str, float] = known

    def __call__(self, name: str) -> "_Seconds":
        self._name = name
        return self

    def __enter__(self):
        self._start = time.monotonic()

    def __exit__(self, *exc):
        spent = time.monotonic() - self._start
        self.values[self._name] = round(self.values.get(self._name, 0.0) + spent, 1)
        files.write_json(self._path, {"version": 1, "seconds": self.values})


def _choose(config: RunConfig, path: Path, finalists: list[Subnet], progress: Progress) -> int:
    """Exports the finalists, scores them on validation text, and makes one of them `export/`.

    The better BLEU wins; where they are within `BLEU_NOISE`, the fewer FLOPs.
    """
    choice_file = path / phases.SUBNET / phases.CHOSEN
    if choice_file.exists() and (path / phases.EXPORT / workdir.MANIFEST).exists():
        return files.read_json(choice_file, "choice")["chosen"]
    valid = prepare.corpus_split(config.data, path, "valid")
    sources, references = evaluate.read_split(valid, config.pipeline.valid_sentences)
    rows = []
    for i, subnet in enumerate(finalists, 1):
        out = f"{phases.SUBNET}/{i}"
        params, _, step = phases.subnet_params(config, path, out)
        folder = path / out / phases.EXPORT
        start = "the supernet's weights" if config.pipeline.inherit else "scratch"
        origin = f"trained from {start}, step {step}"
        phases.export_params(config, path, params, subnet, folder, origin)
        beam = _beam(config)
        scores, _ = evaluate.evaluate(Translator.load(folder), sources, references, beam)
        gflops = complexity.count(subnet).flops / 1e9
        rows.append({"bleu": scores.bleu, "chrf": scores.chrf, "gflops": gflops})
        progress.note(f"finalist {i}: validation BLEU {scores.bleu:.2f}, {gflops:.4g} GFLOPs")
    best = max(row["bleu"] for row in rows)
    near = [i for i, row in enumerate(rows) if row["bleu"] >= best - BLEU_NOISE]
    chosen = min(near, key=lambda i: rows[i]["gflops"])
    source = path / phases.SUBNET / str(chosen + 1) / phases.EXPORT
    _add_scores(source, {"valid": rows[chosen]})
    shutil.rmtree(path / phases.EXPORT, ignore_errors=True)
    temporary = path / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(path / phases.EXPORT)
    if not config.export.exact:
        params, *_ = phases.subnet_params(config, path, f"{phases.SUBNET}/{chosen + 1}")
        export, subnet = path / phases.EXPORT, finalists[chosen]
        approximation.measure(config, path, params, subnet, export, progress)
    files.write_json(choice_file, {"version": 1, "chosen": chosen, "finalists": rows})
    return chosen


def _add_scores(folder: Path, scores: dict[str, Any]):
    manifest = files.read_json(folder / workdir.MANIFEST, "export manifest")
    manifest["scores"].update(scores)
    files.write_json(folder / workdir.MANIFEST, manifest)


def _beam(config: RunConfig) -> int:
    """The beam size that quality is measured at: the latency's, if it was exported."""
    sizes = config.export.beam_sizes
    return config.latency.beam_size if config.latency.beam_size in sizes else max(sizes)


def _compare(
    config: RunConfig,
    path: Path,
    params: Params,
    chosen: Subnet,
    found: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Largest, smallest, random and found subnet side by side, and the trained one."""
    space = config.space
    subnets = {"largest": space.largest(), "smallest": space.smallest()}
    if found["random"]["first"] is not None:
        subnets["random within the limit"] = from_json(found["random"]["first"])
    subnets["searched"] = chosen
    inherited = phases.SupernetExporter(config, path, params, "supernet")
    beam = _beam(config)
    folders = {name: path / REPORT / ".exports" / name.split()[0] for name in subnets}
    for name, folder in folders.items():
        inherited.export(subnets[name], folder, sorted({beam, config.latency.beam_size}))

    progress.note(f"measuring latency ({config.latency.name}), all in turns")
    with Timer(config.latency.threads, config.latency.platform) as timer:
        times = timer.time(list(folders.values()), config.latency)
        threads = timer.threads
    base = times[0]

    test = prepare.corpus_split(config.data, path, "test")
    sources, references = evaluate.read_split(test, config.pipeline.test_sentences)
    rows = []
    for (name, subnet), own in zip(subnets.items(), times, strict=True):
        scores, _ = evaluate.evaluate(Translator.load(folders[name]), sources, references, beam)
        counts = complexity.count(subnet)
        value, low, high = ratio(own, base)
        rows.append(
            {
                "name": name,
                "architecture": short_name(subnet),
                "subnet": to_json(subnet),
                "params": counts.params,
                "active_params": counts.active_params,
                "flops": counts.flops,
                "latency": dataclasses.asdict(summarise(own)),
                "latency_ratio": [value, low, high],
                "bleu_inherited": scores.bleu,
            }
        )
        progress.note(f"{name}: BLEU with inherited weights {scores.bleu:.2f}")
    translator = Translator.load(path / phases.EXPORT)
    scores, translations = evaluate.evaluate(translator, sources, references, beam)
    _add_scores(path / phases.EXPORT, {"test": dataclasses.asdict(scores)})
    shutil.rmtree(path / REPORT / ".exports", ignore_errors=True)
    limit = config.search.constraint.latency_ratio
    return {
        "version": 1,
        "rows": rows,
        "test": dataclasses.asdict(scores),
        "latency": {**dataclasses.asdict(config.latency), "threads_used": threads},
        "limits": found["limits"],
        "limit_ratio": limit or None,
        "searched_loss": next(
            b["sample_loss"] for b in found["best"] if load(path / "search" / b["file"]) == chosen
        ),
        "random": {k: found["random"][k] for k in ("count", "median_loss", "best_loss")},
        "examples": [
            {"source": s, "reference": r, "translation": t}
            for s, r, t in list(zip(sources, references, translations, strict=True))[:10]
        ],
    }
