"""How the parts of paper_tables.py are done: the commands that train, search, score and time."""

import gzip
import json
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

import trainings
from paper_systems import (
    ARCHITECTURES,
    OURS,
    REFERENCE,
    SYSTEMS,
    Corpus,
    Part,
    compared,
    search_of,
    supernet_of,
    taught,
)
from trainings import ROOT

from automoe_jax import config as settings
from automoe_jax.architecture import counts
from automoe_jax.architecture.subnet import from_json, to_json
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.decoding import evaluation
from automoe_jax.phases import rank
from automoe_jax.phases.prepare import stored_split
from automoe_jax.phases.run import RANK, SUBNET, SUPERNET
from automoe_jax.published.subnet_files import load
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

Lines = dict[Part, dict[str, Any]]
GOLD_RUNS = 300
EXAMPLES = 8  # test sentences whose translations are kept
PEAK_RATE = 4e-3
EVALUATIONS = 8  # of a stand-alone training
RANKED_SHARE = 4  # subnets of a ranking have a model's updates over this
_CONFIG = "configs/systems.py"
_REFERENCE = ARCHITECTURES / f"{REFERENCE}.json"
QUANTIZED = {"fp32": "none", "int8": "int8"}


class Study:
    """The parts of one corpus's comparison, in a folder."""

    def __init__(self, corpus: Corpus, folder: Path):
        self._corpus, self._folder, self._lock = corpus, folder, threading.Lock()
        (folder / "architectures").mkdir(parents=True, exist_ok=True)

    def do(self, part: Part, core: trainings.Core | None, lines: Lines) -> dict[str, Any]:
        """Does a part, on one core or for None on all; returns what its line says.

        `lines` are those of the parts that are done.
        """
        if part.kind == "largest":
            return self._largest(part)
        if part.kind == "supernet":
            return self._supernet(part, core)
        if part.kind == "teacher":
            return self._teacher(core)
        if part.kind == "ranking":
            return self._ranking(part, core)
        if part.kind == "search":
            return self._search(part, lines)
        if part.kind == "model":
            return self._model(part, core, lines)
        if part.kind == "difference":
            return self._difference(part, lines)
        return self._latency(part)

    def _largest(self, part: Part) -> dict[str, Any]:
        """How long the largest subnet of a space takes beside the reference, random weights."""
        space = settings.resolve(self._config(part.name)).space
        subnet = self._file(part, to_json(space.largest()))
        _, own = self._timed(self._reference(), self._random(part.name, subnet))
        return {"ratio": own["ratio_to_first"][0], "ms": own["mean_ms"]}

    def _supernet(self, part: Part, core: trainings.Core | None) -> dict[str, Any]:
        updates = self._corpus.updates[0]
        own = {"training.steps": updates, "training.eval_every": updates}
        folder = self._run(part)
        self._take_tokenizer(folder)
        self._launch(core, "train", part.name, folder, {**own, "seed": part.seed})
        losses = trainings.values(folder / SUPERNET, "valid/loss_largest")
        return {"loss_largest": losses[updates], "updates": updates}

    def _teacher(self, core: trainings.Core | None) -> dict[str, Any]:
        """A model of the reference's architecture, and its translations of the training text."""
        folder, updates = self._folder / "teacher", self._corpus.updates[2]
        own = self._training(updates)
        self._take_tokenizer(folder)
        self._launch(core, "train", "by_hand", folder, own, f"--subnet={_REFERENCE}")
        exported = self._export(core, "by_hand", folder, "int8", own)
        if not (self._distilled / "distilled.json").exists():
            more = f"--teacher={exported}", f"--out={self._distilled}"
            self._launch(core, "distill", "by_hand", folder, own, *more)
        bleu = trainings.test_bleu(folder, core, exported)
        return {"bleu": bleu, "updates": updates, "examples": self._examples(folder)}

    def _examples(self, run: Path) -> list[dict[str, str]]:
        """The test sentences whose translations are kept."""
        texts = evaluation.read_split(stored_split(run, "test"), EXAMPLES)
        return [{"source": s, "reference": r} for s, r in zip(*texts, strict=True)]

    def _ranking(self, part: Part, core: trainings.Core | None) -> dict[str, Any]:
        """Some subnets of a space, trained from scratch for a fraction of a model's updates."""
        folder = self._run(part._replace(kind="supernet"))
        updates = self._corpus.updates[1] // RANKED_SHARE
        own = {**self._training(updates), "seed": part.seed}
        self._launch(core, "rank", part.name, folder, own, f"--subnets={self._corpus.ranked}")
        found = files.read_json(folder / RANK / rank.RESULT, "ranking")
        names = ("tau", "tau_low", "tau_high", "corrected", "effects", "subnets")
        return {"updates": updates, **{name: found[name] for name in names}}

    def _search(self, part: Part, lines: Lines) -> dict[str, Any]:
        """The subnet of a system within a budget, by the latencies that the search measures."""
        supernet = supernet_of(SYSTEMS[part.name], part.seed)
        ratio = part.budget / lines[Part("largest", supernet.name)]["ratio"]
        own = {
            "seed": part.seed,
            "search.seed": part.seed,
            "search.keep": 1,
            "search.constraint.latency_ratio": min(ratio, 1.0),
            "search.latency_model": self._latency_model(supernet),
            **self._corpus.search,
        }
        if SYSTEMS[part.name].calibrated:
            ranking = Part("ranking", supernet.name)
            trained = {"version": 1, "subnets": lines[ranking]["subnets"]}
            own["search.calibration"] = self._file(ranking, trained)
        if part.name == "automoe_flops":
            beside = from_json(lines[part._replace(name="automoe")]["subnet"])
            own["search.constraint.gflops"] = counts.count(beside).flops / 1e9
            own["search.constraint.latency_ratio"] = 0.0
        space, out = SYSTEMS[part.name].space, f"search_{part.folder}"
        folder = self._run(supernet)
        printed = self._launch(None, "search", space, folder, own, f"--out={out}", "--json")
        found = json.loads(printed.splitlines()[-1])
        best = found["best"][0]
        subnet = files.read_json(folder / out / best["file"], "subnet")
        return {"subnet": subnet, "loss": best["loss"], "verified": best["verified"],
                "random": found["random"]}  # fmt: skip

    def _latency_model(self, supernet: Part) -> Path:
        """The latency model of a space, fitted where it is missing."""
        path = self._folder / f"latency_{supernet.name}.json"
        if not path.exists():
            own = {k: v for k, v in self._corpus.search.items() if k.startswith("predictor")}
            more = [f"--out={path}"]
            own["seed"] = supernet.seed
            self._launch(None, "fit_latency", supernet.name, self._run(supernet), own, *more)
        return path

    def _model(self, part: Part, core: trainings.Core | None, lines: Lines) -> dict[str, Any]:
        """A model, trained and scored."""
        system, folder, updates = SYSTEMS[part.name], self._run(part), self._corpus.updates[1]
        space, path = system.holder, ARCHITECTURES / f"{part.name}.json"
        if system.space:
            space, path = system.space, self._file(part, lines[search_of(part)]["subnet"])
        own, more = {**self._training(updates), "seed": part.seed}, [f"--subnet={path}"]
        if taught(self._corpus, system):
            own |= {"data.kind": "parallel_text", "data.path": self._distilled}
        if system.inherit:
            more.append(f"--init_from={self._run(supernet_of(system, part.seed))}")
        self._take_tokenizer(folder)
        self._launch(core, "train", space, folder, own, *more)
        scores = {
            kind: self._scores(core, folder, self._export(core, space, folder, kind, own))
            for kind in QUANTIZED
        }
        translations, _ = (own.pop("translations") for own in scores.values())
        subnet = load(path)
        counted = counts.count(subnet)
        losses = trainings.values(folder / SUBNET, "valid/loss_subnet")
        return {
            "subnet": to_json(subnet),
            "updates": updates,
            "loss": losses[updates],
            "losses": losses,
            "params_m": counted.params / 1e6,
            "active_params_m": counted.active_params / 1e6,
            "sparsity": counted.sparsity,
            "gflops": counted.flops / 1e9,
            "translations": translations,
            **({} if self._corpus.distils else {"examples": self._examples(folder)}),
            **scores,
        }

    def _scores(self, core: trainings.Core | None, folder: Path, exported: Path) -> dict[str, Any]:
        """BLEU and chrF of the test sets; of the first, BLEU's 95 % interval (bootstrap)."""
        output = _translated(exported)
        sets = {"test": [f"--workdir={folder}", f"--output={output}"]}
        sets |= {name: self._test_set(name) for name in self._corpus.tests}
        program = [sys.executable, str(ROOT / "launch" / "evaluate.py"), f"--export={exported}"]
        found: dict[str, Any] = {}
        for name, own in sets.items():
            printed = trainings.run_on_core(core, [*program, *own, "--json"])
            scores = json.loads(printed.splitlines()[-1])
            found[name] = {"bleu": scores["bleu"], "chrf": scores["chrf"]}
        hypotheses = files.lines(output.read_text(encoding="utf-8"))
        _, references = evaluation.read_split(stored_split(folder, "test"))
        interval = evaluation.bleu_interval(hypotheses, references)
        return {**found["test"], "bleu_95": interval, "tests": found,
                "translations": hypotheses[:EXAMPLES]}  # fmt: skip

    def _test_set(self, name: str) -> list[str]:
        """The flags of a further test set, unpacked where it is packed."""
        data = self._config("by_hand").data
        flags = []
        for flag, language in (("source", data.source_lang), ("reference", data.target_lang)):
            path = ROOT / data.path / f"{name}.{language}"
            if not path.exists():
                packed, path = path.with_name(path.name + ".gz"), self._folder / path.name
                files.write_text(path, gzip.decompress(packed.read_bytes()).decode("utf-8"))
            flags.append(f"--{flag}={path}")
        return flags

    def _latency(self, part: Part) -> dict[str, Any]:
        """Gold latencies of a model in turns with the reference, as the first of each."""
        folder = self._run(part._replace(kind="model"))
        own = [folder / f"export_{kind}" for kind in QUANTIZED]
        first, *rest = self._timed(self._reference(), *own, kernels=_kernels(part))
        found = {
            kind: {
                "ms": times["mean_ms"],
                "of_reference": times["ratio_to_first"],
                "kernels": times["kernels"],
                "parts_ms": times["parts_ms"],
            }
            for kind, times in zip(QUANTIZED, rest, strict=True)
        }
        return {"reference_ms": first["mean_ms"], **found}

    def _difference(self, part: Part, lines: Lines) -> dict[str, Any]:
        """The model of OURS beside another, in fp32: the difference of their BLEU with its 95 %
        interval (paired bootstrap over sentences), the ratio of their latencies, timed in turns;
        and the losses that the supernet of OURS gives both, where its space has the other.
        """
        models = compared(part)
        runs = [self._run(model) for model in models]
        test, its_test = (evaluation.read_split(stored_split(run, "test")) for run in runs)
        if test != its_test:
            raise UserError(f"{runs[0]} and {runs[1]} have different test text")
        exports = [run / "export_fp32" for run in runs]
        ours, others = (
            files.lines(_translated(path).read_text(encoding="utf-8")) for path in exports
        )
        gain = evaluation.paired_difference(ours, others, test[1])
        _, times = self._timed(*reversed(exports), kernels=_kernels(part), parts=False)
        own, other = (dict(zip(("name", "budget", "seed"), x[1:], strict=True)) for x in models)
        return {
            "ours": own,
            "other": other,
            "bleu": [gain.bleu, gain.low, gain.high],
            "latency_ratio": times["ratio_to_first"],
            "inherited": self._inherited([lines[model]["subnet"] for model in models], part.seed),
        }

    def _inherited(self, subnets: list[dict[str, Any]], seed: int) -> list[float] | None:
        """Validation losses with weights of the supernet of OURS; None if one is not in it."""
        space = settings.resolve(self._config(OURS)).space
        found = [from_json(subnet) for subnet in subnets]
        try:
            for subnet in found:
                space.validate(subnet)
        except UserError:
            return None
        # Imported here: what trains takes 0.7 s to load, and --list needs none of it.
        import supernet_options  # noqa: PLC0415

        return supernet_options.inherited(self._run(supernet_of(SYSTEMS[OURS], seed)), found)

    def _timed(
        self, *exports: Path, kernels: str = "auto", parts: bool = True
    ) -> list[dict[str, Any]]:
        """The times of exports, in turns; `parts` for those of the parts of a translation, too."""
        program = [sys.executable, str(ROOT / "launch" / "benchmark.py"), "--json"]
        given = [
            f"--runs={GOLD_RUNS}",
            f"--kernels={kernels}",
            *["--parts"] * parts,
            *(f"--export={path}" for path in exports),
        ]
        printed = trainings.run_on_core(None, [*program, *given])
        rows = json.loads(printed.splitlines()[-1])["exports"]
        more = ("kernels", *["parts_ms"] * parts)
        return [row["inputs"]["mixed words"] | {k: row[k] for k in more} for row in rows]

    def _reference(self) -> Path:
        return self._random("by_hand", _REFERENCE)

    def _random(self, space: str, subnet: Path) -> Path:
        """An export with random weights."""
        out = self._folder / "timed" / f"{space}_{subnet.stem}"
        if not (out / "manifest.json").exists():
            more = f"--subnet={subnet}", "--random_weights", f"--out={out}"
            self._launch(None, "export", space, self._folder / "timed", {}, *more)
        return out

    def _export(
        self, core: trainings.Core | None, space: str, run: Path, kind: str, own: dict[str, Any]
    ) -> Path:
        """The export of a run's subnet in a precision; `own` are its settings."""
        out = run / f"export_{kind}"
        if not (out / "manifest.json").exists():
            more = f"--out={out}", f"--quantize={QUANTIZED[kind]}"
            self._launch(core, "export", space, run, own, *more)
        return out

    def _take_tokenizer(self, run: Path):
        """Gives a new run the tokenizer of the corpus, so that all models have the same."""
        prepared = self._folder / "prepared"
        with self._lock:
            if not (prepared / "tokens" / "valid").exists():
                self._launch(None, "prepare", "by_hand", prepared, {})
        if not (run / "tokenizer").exists():
            run.mkdir(parents=True, exist_ok=True)
            tokenizers.copy(prepared / "tokenizer", run / "tokenizer")

    @property
    def _distilled(self) -> Path:
        return self._folder / "distilled"

    def _run(self, part: Part) -> Path:
        """The workdir of a supernet or a model."""
        return self._folder / f"{part.kind}s" / part.folder

    def _file(self, part: Part, content: dict[str, Any]) -> Path:
        """A subnet, or what a ranking trained, in a file of its own."""
        path = self._folder / "architectures" / f"{part.kind}-{part.folder}.json"
        files.write_json(path, content)
        return path

    def _training(self, updates: int) -> dict[str, Any]:
        """The settings of a stand-alone training, beside those of the corpus."""
        return {
            "subnet_training.peak_rate": PEAK_RATE,
            "subnet_training.steps": updates,
            "subnet_training.warmup_steps": min(updates // 4, 400),
            "subnet_training.eval_every": max(updates // EVALUATIONS, 1),
        }

    def _config(self, space: str) -> Any:
        """The config of a space."""
        get_config = runpy.run_path(str(ROOT / _CONFIG))["get_config"]
        config = get_config(f"{self._corpus.config}:{space}")
        config.update_from_flattened_dict(self._corpus.settings)
        return config

    def _launch(
        self,
        core: trainings.Core | None,
        program: str,
        space: str,
        workdir: Path,
        own: dict[str, Any],
        *more: str,
    ) -> str:
        """What a program of launch/ prints."""
        config = f"--config={_CONFIG}:{self._corpus.config}:{space}"
        flags = trainings.flags({**self._corpus.settings, **own})
        command = [sys.executable, str(ROOT / "launch" / f"{program}.py"), config]
        return trainings.run_on_core(core, [*command, f"--workdir={workdir}", *flags, *more])


def _translated(export: Path) -> Path:
    """The translations of the test set by an export of a run."""
    return export.with_name(f"test_{export.name}.txt")


def _kernels(part: Part) -> str:
    """The kernels of everything that a part times: cells that have none run on XLA's operations."""
    return "xla" if SYSTEMS[part.name].holder == "evolved" else "auto"
