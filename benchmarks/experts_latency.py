"""What experts cost on this CPU at equal active FLOPs: one sentence, 30 tokens in, 30 out, beam 5.

python benchmarks/experts_latency.py --json
python benchmarks/experts_latency.py --json --dense=EXPORT --experts=EXPORT    # trained ones too

Models with eight equal experts in each layer beside the same with one FFN of that size: width 128
(3 + 2 layers, FFN 512, 8,000 words) and Transformer-Base (32,768 words), random weights, fp32 and
int8. With shared embeddings all hypotheses of random weights repeat one word, whose expert serves
them all; "spread" has an output layer of its own, and hypotheses that differ, as those of trained
models do. All are timed in turns by one process on all CPUs; ratios are medians over the turns.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import trainings
from cpu_latency import QUANTIZED, SUBNETS, interleave
from measure import finish, goal, machine, names, spread
from translators import Engine, protocol_source, random_export

EXPERTS = 8
GOALS = {"none": 1.15, "int8": 1.08}
SMALL_WORDS = 8_000
EMBEDDINGS = {"": "all", " spread": "none"}


def base(experts: int) -> dict:
    """Transformer-Base with this number of experts in each layer."""
    subnet = json.loads((SUBNETS / "transformer_base.json").read_text())
    for side in ("encoder", "decoder"):
        for layer in subnet[side]["layers"]:
            layer["experts"] = layer["experts"] * experts
    return subnet


# How an architecture with a number of experts is made, and what its export has of its own.
MODELS: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, Any]]] = {
    "width 128": (lambda n: trainings.architecture([512] * n), {"words": SMALL_WORDS}),
    "base": (base, {}),
}


def write_exports(folder: Path, models: list[str]) -> dict[str, tuple[Path, Path]]:
    """By name and quantization: the export with one FFN a layer, and that with experts."""
    pairs = {}
    for quantize, name, (kind, share) in itertools.product(QUANTIZED, models, EMBEDDINGS.items()):
        make, own = MODELS[name]
        exports = []
        for n in (1, EXPERTS):
            file = folder / f"{name}_{n}.json"
            file.write_text(json.dumps(make(n)))
            exports.append(folder / f"{name}_{n}_{quantize}_{share}")
            random_export(file, exports[-1], quantize, share_embeddings=share, **own)
        pairs[f"{name}{kind}, {quantize}"] = (exports[0], exports[1])
    return pairs


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--only", default=",".join(MODELS), help="models, with commas")
    parser.add_argument("--dense", type=Path, help="an export to compare with that of --experts")
    parser.add_argument("--experts", type=Path)
    args = parser.parse_args()
    if (args.dense is None) != (args.experts is None):
        sys.exit("give --dense and --experts together, or neither")
    with tempfile.TemporaryDirectory() as temporary:
        pairs = write_exports(Path(temporary), names(args.only, MODELS))
        if args.dense:
            pairs["trained"] = (args.dense.absolute(), args.experts.absolute())
        engine = Engine("ours", sorted(os.sched_getaffinity(0)))
        source = [4 + token % (SMALL_WORDS - 4) for token in protocol_source()[:-1]]
        source.append(protocol_source()[-1])
        calls = {
            f"{name}, {n}": partial(
                engine.ask, call="latency", path=str(path), compute="", source=source
            )
            for name, pair in pairs.items()
            for n, path in zip((1, EXPERTS), pair, strict=True)
        }
        times = interleave(calls, args.rounds)
        engine.close()
    ratios = {
        name: np.array(times[f"{name}, {EXPERTS}"]) / np.array(times[f"{name}, 1"])
        for name in pairs
    }
    goals = {
        f"{name}: {EXPERTS} experts / 1": goal(
            float(np.median(own)), GOALS["int8" if "int8" in name else "none"]
        )
        for name, own in ratios.items()
    }
    result = {
        "benchmark": "experts_latency",
        **machine(),
        "rounds": args.rounds,
        "ms": {name: spread(own) for name, own in times.items()},
        "ratio": {
            name: dict(zip(("q1", "median", "q3"), np.quantile(own, [0.25, 0.5, 0.75]).tolist(),
                           strict=True))
            for name, own in ratios.items()
        },
    }  # fmt: skip
    finish(result, goals)


if __name__ == "__main__":
    main()
