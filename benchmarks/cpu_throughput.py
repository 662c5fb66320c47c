"""Throughput of a trained dense model on this CPU, beside CTranslate2.

python benchmarks/cpu_throughput.py --json [--workdir=runs/multi30k_dense]

3,000 sentences of Multi30k (all of its validation and test text), beam 5, to their natural ends,
with the model of configs/multi30k_dense.py, which is trained first where the workdir has none. Each
engine has a process of its own for each number of threads. It tries batch sizes on 300 sentences
and keeps the fastest; then all are timed in turns. The translations of both are compared, and those
in int8 are scored against those in fp32. Needs the shared data; CTranslate2 takes part where it is
installed (`pip install ctranslate2`).
"""

import argparse
import gzip
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, goal, machine, spread
from translators import Engine
from translators import write_ctranslate2 as convert

from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.decoding import native
from automoe_jax.decoding.batching import BATCH_TOKENS
from automoe_jax.decoding.evaluation import score

ROOT = Path(__file__).parent.parent
CONFIG, SUBNET = "configs/multi30k_dense.py", "configs/multi30k_dense.json"
SENTENCES, SAMPLE = 3000, 300
SPLITS = ("test", "test2017_flickr", "valid")  # the test set comes first: it is also scored alone
N_TEST = 1000
BATCHES = (256, 512, 1024, 2048, 4096)
CTRANSLATE2_TYPES = {"fp32": "float32", "int8": "int8_float32"}


def texts(language: str) -> list[str]:
    """Sentences of one language, whitespace stripped."""
    shared = Path(os.environ.get("AUTOMOE_SHARED", ROOT.parent / "shared"))
    lines = []
    for split in SPLITS:
        path = shared / "data" / "multi30k" / f"{split}.{language}.gz"
        if not path.exists():
            sys.exit(f"{path} does not exist; set AUTOMOE_SHARED to the folder of the shared data")
        with gzip.open(path, "rt", encoding="utf-8") as f:
            lines += [line.strip() for line in f]
    return lines[:SENTENCES]


def launch(program: str, *arguments: str):
    """Runs a program of the project; its progress goes to stderr."""
    command = [sys.executable, ROOT / "launch" / f"{program}.py", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU as the project reports it."""
    return score(hypotheses, references).bleu


class Case:
    """An engine at one precision and number of threads."""

    def __init__(self, engine: Engine, path: Path, compute: str):
        self._ask = partial(engine.ask, call="throughput", path=str(path), compute=compute)
        self.batch = 0
        self.tried: dict[int, float] = {}
        self.found: list[list[int]] = []

    def tune(self, sources: list[list[int]]):
        """Finds the fastest batch size; of two runs of each the second is timed."""
        for batch in BATCHES:
            self._ask(sources=sources, batch=batch)
            self.tried[batch] = self._ask(sources=sources, batch=batch)[0]
        self.batch = min(self.tried, key=self.tried.__getitem__)

    def run(self, sources: list[list[int]]) -> float:
        """Translates all sentences; returns sentences per second."""
        seconds, self.found = self._ask(sources=sources, batch=self.batch)
        return len(sources) / seconds


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--workdir", default=str(ROOT / "runs" / "multi30k_dense"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    english, german = texts("en"), texts("de")
    run = Path(options.workdir).absolute()
    flags = (f"--config={CONFIG}", f"--workdir={run}")
    launch("train", *flags, f"--subnet={SUBNET}")  # returns at once where it is trained
    if not native.available():
        sys.exit(f"the kernels cannot be used here: {native.reason()}")
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind, quantize in (("fp32", "none"), ("int8", "int8")):
            launch("export", *flags, f"--out={folder}/{kind}", f"--quantize={quantize}")
        sources = tokenizers.load(run / "tokenizer").encode(english)
        sample = sources[:: SENTENCES // SAMPLE]
        ctranslate2 = importlib.util.find_spec("ctranslate2") is not None
        if ctranslate2:
            convert(folder / "fp32", folder / "ct2")
        engines: dict[str, Engine] = {}
        cases: dict[str, Case] = {}
        for n in sorted({1, min(2, len(cpus))}):
            engines[f"ours {n}"] = ours = Engine("ours", cpus[:n])
            for kind in ("fp32", "int8"):
                cases[f"ours {kind} {n}"] = Case(ours, folder / kind, "")
            if ctranslate2:
                engines[f"ctranslate2 {n}"] = theirs = Engine("ctranslate2", cpus[:n])
                for kind, compute in CTRANSLATE2_TYPES.items():
                    cases[f"ctranslate2 {kind} {n}"] = Case(theirs, folder / "ct2", compute)
        for name, case in cases.items():
            case.tune(sample)
            print(f"{name}: best of {case.tried} is {case.batch}", file=sys.stderr)
        rates: dict[str, list[float]] = {name: [] for name in cases}
        names = list(cases)
        for i in range(options.rounds + 1):
            for k in range(len(names)):
                name = names[(i + k) % len(names)]
                rate = cases[name].run(sources)
                if i:  # the first compiles
                    rates[name].append(rate)
        n = max(int(name.split()[1]) for name in engines)
        for engine in engines.values():
            engine.close()
        memory = {}
        for kind in CTRANSLATE2_TYPES:  # one export and the default batch size, as a user has them
            engine, path = Engine("ours", cpus[:n]), str(folder / kind)
            batch = {"sources": sources, "batch": BATCH_TOKENS}
            engine.ask(call="throughput", path=path, compute="", **batch)
            weights = (folder / kind / "weights.safetensors").stat().st_size
            memory[kind] = {"peak_mb": engine.ask(call="peak") / 1e6, "weights_mb": weights / 1e6}
            engine.close()

    tokenizer = tokenizers.load(run / "tokenizer")
    decoded = {name: tokenizer.decode(case.found) for name, case in cases.items()}
    scores = {
        name: {"bleu": bleu(d, german), "bleu_test": bleu(d[:N_TEST], german[:N_TEST])}
        for name, d in decoded.items()
    }
    median = {name: float(np.median(r)) for name, r in rates.items()}
    difference = abs(scores[f"ours int8 {n}"]["bleu"] - scores[f"ours fp32 {n}"]["bleu"])
    goals: dict[str, Any] = {"int8 BLEU - fp32 BLEU": goal(difference, 0.2)}
    for kind in ("fp32", "int8"):
        if ctranslate2:
            for threads in sorted({name.split()[2] for name in cases}):
                ratio = median[f"ours {kind} {threads}"] / median[f"ctranslate2 {kind} {threads}"]
                goals[f"{kind}, {threads} thread(s) / CTranslate2"] = goal(
                    ratio, 1.0, at_most=False
                )
    if ctranslate2:
        pairs = zip(
            cases[f"ours fp32 {n}"].found, cases[f"ctranslate2 fp32 {n}"].found, strict=True
        )
        equal = float(np.mean([a == b for a, b in pairs]))
        goals["equal translations, fp32"] = goal(equal, 0.99, at_most=False)
    for kind, m in memory.items():
        goals[f"{kind} peak MB beyond the weights"] = goal(m["peak_mb"] - m["weights_mb"], 400.0)
    result = {
        "benchmark": "cpu_throughput",
        **machine(),
        "sentences": len(sources),
        "rounds": options.rounds,
        "sentences_per_s": {name: spread(r) for name, r in rates.items()},
        "batch_tokens": {name: case.batch for name, case in cases.items()},
        "tuning_s": {name: case.tried for name, case in cases.items()},
        "scores": scores,
        "memory": memory,
        "absent": [] if ctranslate2 else ["ctranslate2"],
    }
    finish(result, goals)


if __name__ == "__main__":
    main()
