"""All phases in one workdir: from parallel text to an exported translator and a report.

A phase is skipped if its last file exists; training and search continue where they were. So the
pipeline can be killed at any point and started again.
"""

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.data.tokens import PreparedData
from automoe_jax.decoding import evaluation
from automoe_jax.decoding.manifest import read_manifest
from automoe_jax.decoding.translator import DEFAULT_BEAM, Translator, default_beam
from automoe_jax.model.extract import Params, inherited
from automoe_jax.phases import (
    distill,
    halving,
    report,
    search_context,
    search_result,
    teachers,
    train,
    weights,
)  # fmt: skip
from automoe_jax.phases.distill import Distillation
from automoe_jax.phases.export import (
    add_scores,
    export_params,
    measure_approximation,
    with_export,
)
from automoe_jax.phases.prepare import corpus_split, open_splits, other_text, prepare
from automoe_jax.phases.run import EXPORT, REPORT, SEARCH, SUBNET, SUPERNET, Run, claim, each_part
from automoe_jax.phases.search import search
from automoe_jax.published.subnet_files import load
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training.checkpoints import latest_step
from automoe_jax.training.loop import has_ended
from automoe_jax.training.target import check_has_supernet

SECONDS = "seconds.json"
TEACHER, DISTILLED = "teacher", "distilled"  # folders: an export, and its translations
HALVING = f"{SUBNET}/halving"  # not that of `launch/halving.py`, which may have other candidates
# Differences of BLEU below this are noise: the cheaper finalist is chosen.
BLEU_NOISE = 0.2
_WEIGHTS = "subnet_weights"  # key of the manifest


def run_pipeline(run: Run) -> dict[str, Any]:
    """Runs the phases that are not done; returns the content of `report/results.json`."""
    config = run.config
    check_has_supernet(config.space)
    with _timed(run, "prepare"):
        other = config.pipeline.teacher not in ("", SUPERNET)
        data = prepare(run, teachers.home(_path(config.pipeline.teacher)) if other else None)
        if "test" not in open_splits(run):
            raise UserError(
                f"the corpus {config.data.path} has no test split, which the pipeline reports on; "
                "add test files, or run launch/train.py, search.py and export.py one by one"
            )
    _check(run, data)
    # The settings that no other manifest has.
    begun = (run.path / SUBNET).exists()
    # A random subnet beside the finalists changes none of them.
    settled = dataclasses.replace(config.pipeline, train_random=False)
    content = {**config.groups("export", "latency"), "pipeline": settled, **_trained(run)}
    claim(run, REPORT, REPORT, content, begun=begun, added=[_WEIGHTS, "subnet_training"])

    searched = run.path / SEARCH / search_result.RESULT
    chosen = run.path / SUBNET / weights.CHOSEN
    reported = run.path / REPORT / report.RESULTS
    _announce(run, 1, "supernet training", searched.exists())
    with _timed(run, "supernet"):
        train.train_supernet(run)
        params, step = weights.supernet_params(run, data.tokenizer.vocab_sizes)

    _announce(run, 2, "search", searched.exists())
    folder = run.path / SEARCH
    with _timed(run, "search"):
        found = search(run, folder, data, params, step)
    finalists = {f"{SUBNET}/{i}": x for i, x in enumerate(finalists_of(run, found), 1)}

    beside = _random(run, found)
    also = " and the random subnet" if beside else ""
    ended = (has_ended(run.path / out, config.subnet_training) for out in beside)
    done = chosen.exists() and all(ended)
    _announce(run, 3, f"training {len(finalists)} finalist(s){also}", done)
    if not done:
        with _timed(run, "distillation"):
            text = _distilled(run, params, step)
        with _timed(run, "finalists"):
            _train_all(run, {**finalists, **beside}, text)

    done = chosen.exists() and (run.path / EXPORT / workdir.MANIFEST).exists()
    _announce(run, 4, "export", done)
    if not done:
        with _timed(run, "export"):
            _choose(run, finalists)

    done = reported.exists() and (not beside or _has_gain(reported))
    _announce(run, 5, "report", done)
    if not done:
        with _timed(run, "report"):
            best = weights.chosen_finalist(run)
            results = report.compare(run, params, finalists[best], found)
            results |= report.routing_of(run, data, best)
        report.write(run, {**results, "seconds": _seconds(run)}, found)
    return files.read_json(reported, "report")


def _has_gain(reported: Path) -> bool:
    """True if a report compares with the random subnet, as trained."""
    return files.read_json(reported, "report").get("gain_over_random") is not None


def finalists_of(run: Run, found: dict[str, Any]) -> list[Subnet]:
    """The found subnets to train, by `pipeline.halving`; `found` as in `search/result.json`."""
    subnets = [load(run.path / SEARCH / row["file"]) for row in found["best"]]
    pipeline = run.config.pipeline
    if pipeline.halving and pipeline.chooses_among(len(subnets)):
        with _timed(run, "halving"):
            ranked = halving.halve(run, HALVING, subnets, pipeline.halving)
        subnets = [from_json(row["subnet"]) for row in ranked["subnets"]]
    return subnets[: pipeline.finalists]


def _trained(run: Run) -> dict[str, Any]:
    """How the finalists are trained, and which of their weights are exported, for the manifest."""
    weights_from = {_WEIGHTS: "last", **run.config.subnet_training.weights_for(_WEIGHTS)}
    return {**weights_from, **run.config.groups("subnet_training")}


def _announce(run: Run, number: int, phase: str, done: bool):
    run.progress.note(f"phase {number} of 5: {phase}{', which is done' if done else ''}")


def _check(run: Run, data: PreparedData):
    """Raises what a later phase would, before hours of training, as far as it is known now."""
    config = run.config
    if not (run.path / SEARCH / search_result.RESULT).exists():
        search_context.check(config, data.tokenizer.vocab_sizes)
        if latest_step(run.supernet) is None:
            search_context.check_latency(run, data.tokenizer.vocab_sizes)
    if not (run.path / REPORT / report.RESULTS).exists():
        search_context.check_timing(config.latency)
    if (run.path / SUBNET / weights.CHOSEN).exists():
        return
    teacher, distilled = config.pipeline.teacher, config.pipeline.distill
    if teacher not in ("", SUPERNET):
        teachers.load(_path(teacher), data.tokenizer, Silent())
    if distilled:
        _distillation(run, None if distilled == SUPERNET else _path(distilled))


def _train_all(run: Run, subnets: dict[str, Subnet], text: Path | None):
    """Trains subnets, each in a folder, on the corpus `text` in place of the run's."""
    if text is not None:
        other_text(run, text)  # once, before several workers want it
    work = functools.partial(_train, text, _folder(run, run.config.pipeline.teacher))
    for _ in each_part(run, work, list(subnets.items())):
        pass


def _train(text: Path | None, teacher: Path | None, run: Run, part: tuple[str, Subnet]):
    """Trains a finalist or the random subnet, on the corpus `text` in place of the run's."""
    out, subnet = part
    start = run.path if run.config.pipeline.inherit else None
    train.train_subnet(run, subnet, start, out, teacher=teacher, text=text)


def _path(folder: str) -> Path:
    return files.expanded(folder).absolute()


def _random(run: Run, found: dict[str, Any]) -> dict[str, Subnet]:
    """The random subnet to train beside the finalists, by its folder, if there is one."""
    first = found["random"]["first"]
    wanted = run.config.pipeline.train_random and first is not None
    return {report.RANDOM_SUBNET: from_json(first)} if wanted else {}


def _folder(run: Run, teacher: str) -> Path | None:
    """The folder of `pipeline.teacher`."""
    if not teacher:
        return None
    return run.path / SUPERNET if teacher == SUPERNET else _path(teacher)


def _distilled(run: Run, params: Params, step: int) -> Path | None:
    """The corpus of `pipeline.distill`, made where it is missing; `params` of the supernet."""
    teacher, folder = run.config.pipeline.distill, run.path / DISTILLED
    if not teacher:
        return None
    export = run.path / TEACHER if teacher == SUPERNET else _path(teacher)
    if teacher == SUPERNET and not (export / workdir.MANIFEST).exists():
        largest = run.config.space.largest()
        own = with_export(run, quantize="int8", beam_sizes=(DEFAULT_BEAM,))
        weights_from = weights.origin(
            run.supernet, "largest subnet of the supernet", step, run.config.training.final_weights
        )
        export_params(
            own, inherited(params, largest, run.config.space), largest, export, weights_from
        )
    how = _distillation(run, export)
    found = distill.distill(run, open_splits(run), distill.Teacher(export), how, folder)
    run.progress.note(f"{found.pairs:,} training pairs, {found.translated:,} of them translated")
    return folder


def _distillation(run: Run, export: Path | None) -> Distillation:
    """How an export, or None for the supernet's that is not made yet, translates the text."""
    pipeline = run.config.pipeline
    sizes = [DEFAULT_BEAM] if export is None else read_manifest(export)["beam_sizes"]
    beam = default_beam(sizes)
    if pipeline.distill_n_best > beam:
        raise UserError(
            f"config.pipeline.distill_n_best is {pipeline.distill_n_best}; allowed: 1 to the "
            f"beam of {pipeline.distill}, {beam}"
        )
    return Distillation(beam, choice=pipeline.distill_choice, n_best=pipeline.distill_n_best)


def _seconds(run: Run) -> dict[str, float]:
    path = run.path / SECONDS
    return files.read_json(path, "timing")["seconds"] if path.exists() else {}


@contextlib.contextmanager
def _timed(run: Run, name: str) -> Iterator[None]:
    """Adds the wall time of a phase to `seconds.json`."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds = _seconds(run)
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - start, 1)
        files.write_json(run.path / SECONDS, {"version": 1, "seconds": seconds})


def _choose(run: Run, finalists: dict[str, Subnet]):
    """Exports the finalists, scores them on validation text, and copies one to `export/`.

    The best BLEU wins; among those within `BLEU_NOISE` of it, the fewest FLOPs.
    """
    pipeline, beam = run.config.pipeline, report.beam_size(run.config)
    valid = corpus_split(run, "valid")
    sources, references = evaluation.read_split(valid, pipeline.valid_sentences)
    start = "the supernet's weights" if pipeline.inherit else "scratch"
    kind = run.config.subnet_training.final_weights
    rows = {}
    for out, subnet in finalists.items():
        params, _, step = weights.subnet_params(run, out)
        folder = run.path / out / EXPORT
        origin = weights.origin(run.path / out, f"trained from {start}", step, kind)
        export_params(run, params, subnet, folder, origin)
        scores, _ = evaluation.evaluate(Translator.load(folder), sources, references, beam)
        gflops = complexity.count(subnet).flops / 1e9
        rows[out] = {"bleu": scores.bleu, "chrf": scores.chrf, "gflops": gflops}
        run.progress.note(
            f"finalist {len(rows)}: validation BLEU {scores.bleu:.2f}, {gflops:.4g} GFLOPs"
        )
    best = max(row["bleu"] for row in rows.values())
    near = [out for out, row in rows.items() if row["bleu"] >= best - BLEU_NOISE]
    chosen = min(near, key=lambda out: rows[out]["gflops"])
    source, export = run.path / chosen / EXPORT, run.path / EXPORT
    add_scores(source, {"valid": rows[chosen]})
    temporary = export.with_name(".export.tmp")
    for folder in (export, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(export)
    if not run.config.export.exact:
        params, subnet, _ = weights.subnet_params(run, chosen)
        measure_approximation(run, params, subnet, export)
    choice = {"version": 1, "folder": chosen, "finalists": list(rows.values())}
    files.write_json(run.path / SUBNET / weights.CHOSEN, choice)
