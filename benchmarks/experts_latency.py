"""What experts cost on this CPU at equal active FLOPs: one sentence, 30 tokens in, 30 out, beam 5.

python benchmarks/experts_latency.py --json
python benchmarks/experts_latency.py --json --dense=EXPORT --experts=EXPORT    # trained ones too

Models with eight equal experts in each layer beside the same with one FFN of that size: width 128
(3 + 2 layers, FFN 512, 8,000 words) and Transformer-Base (32,768 words), random weights, fp32 and
int8. All are timed in turns by one process on all CPUs; ratios are medians over the turns.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import trainings
from cpu_latency import QUANTIZED, SUBNETS, interleave
from measure import finish, goal, machine, spread
from translators import Engine, protocol_source, random_export

EXPERTS = 8
GOALS = {"none": 1.15, "int8": 1.08}
SMALL_WORDS = 8_000


def base(experts: int) -> dict:
    """Transformer-Base with this number of experts in each layer."""
    subnet = json.loads((SUBNETS / "transformer_base.json").read_text())
    for side in ("encoder", "decoder"):
        for layer in subnet[side]["layers"]:
            layer["experts"] = layer["experts"] * experts
    return subnet


def write_exports(folder: Path) -> dict[str, tuple[Path, Path]]:
    """By name and quantization: the export with one FFN a layer, and that with experts."""
    pairs = {}
    for quantize in QUANTIZED:
        for name, make, words in (
            ("width 128", lambda n: trainings.architecture([512] * n), SMALL_WORDS),
            ("base", base, None),
        ):
            own = []
            for n in (1, EXPERTS):
                file = folder / f"{name}_{n}.json"
                file.write_text(json.dumps(make(n)))
                own.append(folder / f"{name}_{n}_{quantize}")
                random_export(file, own[-1], quantize, **({"words": words} if words else {}))
            pairs[f"{name}, {quantize}"] = (own[0], own[1])
    return pairs


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--dense", type=Path, help="an export to compare with that of --experts")
    parser.add_argument("--experts", type=Path)
    args = parser.parse_args()
    if (args.dense is None) != (args.experts is None):
        sys.exit("give --dense and --experts together, or neither")
    with tempfile.TemporaryDirectory() as temporary:
        pairs = write_exports(Path(temporary))
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
