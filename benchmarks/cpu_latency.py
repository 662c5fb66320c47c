"""Latency of exported models on this CPU, beside CTranslate2 and PyTorch.

python benchmarks/cpu_latency.py --json

One sentence, 30 tokens in, 30 out, beam 5, random weights, 32,768 words. Each engine has a process
of its own for each number of threads; all are timed in turns, each after an untimed run. The floor
of a model is 30 times the bytes that its decoder reads at a step (the weights one token uses and
the output layer) at the memory bandwidth measured between the rounds; a CPU whose cache holds the
weights can beat it. CTranslate2 and PyTorch take part where they are installed
(`pip install ctranslate2 torch==2.13.0`); goals that compare with CTranslate2 need it.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import finish, goal, machine, read_bandwidth, spread
from translators import BEAM, TOKENS, VOCAB, Engine, protocol_source, random_export
from translators import write_ctranslate2 as convert

from automoe_jax.architecture.subnet import DecoderLayer
from automoe_jax.decoding import native
from automoe_jax.decoding.native_engine import PackedScope
from automoe_jax.decoding.weights import pack
from automoe_jax.published import subnet_files

SUBNETS = Path(__file__).parent.parent / "configs" / "subnets"
MODELS = {
    "base": "transformer_base",
    "big": "transformer_big",
    "ende_standard": "wmt14_ende_standard",
    "ende_fractional": "wmt14_ende_fractional",
}
DENSE = ("base", "big")
QUANTIZED = ("none", "int8")
CTRANSLATE2_TYPES = ("float32", "int8_float32")
# A decoder layer: 5 rows through one of 6 experts of this size, 512 wide.
EXPERTS, EXPERT_SIZE, WIDTH, COPIES = 6, 3072, 512, 8
STARTUP = """
import json, sys
from automoe_jax import Translator
translator = Translator.load(sys.argv[1])
translator.translate_ids([json.loads(sys.argv[2])], max_length=30)
with open("/proc/self/status") as f:
    peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
print(json.dumps([peak, translator.manifest["weights_bytes"]]))
"""


def step_bytes(name: str) -> int:
    """Bytes of fp32 weights that the decoder reads at every step."""
    subnet = subnet_files.load(SUBNETS / f"{MODELS[name]}.json", 512)
    d, q = subnet.decoder.embed_dim, subnet.qkv_dim
    size = VOCAB * d
    for layer in subnet.decoder.layers:
        size += 6 * d * q + 2 * d * max(layer.experts)
    return 4 * size


def expert_layers() -> dict[str, Callable[[], Any]]:
    """Dense layers, and layers of 6 experts where the router sends all rows to one."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BEAM, WIDTH), np.float32))
    programs = {}
    for name, n in (("dense", 1), ("experts", EXPERTS)):
        layer = DecoderLayer(8, 8, 1, (EXPERT_SIZE,) * n, 1)
        weights: dict[str, np.ndarray] = {}
        for copy in range(COPIES):  # together larger than a cache, as in a model
            for e in range(n):
                p = f"{copy}.expert_{e}"
                weights[f"{p}.fc1.kernel"] = rng.standard_normal((WIDTH, EXPERT_SIZE), np.float32)
                weights[f"{p}.fc2.kernel"] = rng.standard_normal((EXPERT_SIZE, WIDTH), np.float32)
                weights[f"{p}.fc1.bias"] = np.zeros(EXPERT_SIZE, np.float32)
                weights[f"{p}.fc2.bias"] = np.zeros(WIDTH, np.float32)
            weights[f"{copy}.router.kernel"] = np.zeros((WIDTH, n), np.float32)
            chosen = np.arange(n) == copy % n
            weights[f"{copy}.router.bias"] = np.where(chosen, 9, 0).astype(np.float32)
            weights[f"{copy}.experts_norm.scale"] = np.ones(WIDTH, np.float32)
            weights[f"{copy}.experts_norm.bias"] = np.zeros(WIDTH, np.float32)
        # `pack` expects an output layer.
        weights["embedding"] = np.zeros((1, 1), np.float32)
        packed = {k: jnp.asarray(v) for k, v in pack(weights).items()}

        def run(weights, x, layer=layer):
            for copy in range(COPIES):
                scope = PackedScope(weights, str(copy), jnp.int32(BEAM))
                x = scope.experts_add_norm(layer, "probability", x)
            return x

        programs[name] = partial(jax.jit(run), packed, x)
    return programs


def startup(export: Path) -> dict[str, float]:
    """Seconds and peak memory of a process that loads an export and translates a sentence."""
    command = [sys.executable, "-c", STARTUP, str(export), json.dumps(protocol_source())]
    seconds, peak, weights = [], 0, 0
    for _ in range(6):
        start = time.perf_counter()
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        peak, weights = json.loads(out.stdout)
    first, *later = seconds
    return {
        "first_s": first,
        "second_s": float(np.median(later)),
        "peak_mb": peak / 1e6,
        "weights_mb": weights / 1e6,
    }


def interleave(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The values that calls return, in turns; each round begins with another, two warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds + 2):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            value = calls[name]()
            if i >= 2:
                times[name].append(value)
    return times


def timed(program: Callable[[], Any]) -> float:
    """Milliseconds of a JAX call."""
    start = time.perf_counter()
    jax.block_until_ready(program())
    return (time.perf_counter() - start) * 1000


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()

    def note(text: str):
        if not options.json:
            print(text, file=sys.stderr)

    if not native.available():
        sys.exit(f"the kernels cannot be used here: {native.reason()}")
    cpus = sorted(os.sched_getaffinity(0))
    threads = sorted({1, min(2, len(cpus))})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        note("writing models")
        for name, file in MODELS.items():
            for quantize in QUANTIZED:
                random_export(SUBNETS / f"{file}.json", folder / f"{name}_{quantize}", quantize)
        present = [n for n in ("ctranslate2", "torch") if importlib.util.find_spec(n)]
        if "ctranslate2" in present:
            for name in DENSE:
                convert(folder / f"{name}_none", folder / f"ct2_{name}")
        started = startup(folder / "ende_standard_none")
        note(f"start: {started}")

        engines, calls = [], {}
        source = protocol_source()

        def add(engine: Engine, label: str, path: Path, compute: str = ""):
            calls[label] = partial(
                engine.ask, call="latency", path=str(path), compute=compute, source=source
            )

        for n in threads:
            engines.append(Engine("ours", cpus[:n]))
            for name in MODELS:
                for quantize in QUANTIZED:
                    kind = "int8" if quantize == "int8" else "fp32"
                    path = folder / f"{name}_{quantize}"
                    add(engines[-1], f"ours {name} {kind} {n}", path)
            if "ctranslate2" in present:
                engines.append(Engine("ctranslate2", cpus[:n]))
                for name in DENSE:
                    for kind in CTRANSLATE2_TYPES:
                        path = folder / f"ct2_{name}"
                        add(engines[-1], f"ctranslate2 {name} {kind} {n}", path, kind)
            if "torch" in present:
                engines.append(Engine("pytorch", cpus[:n]))
                for name in DENSE:
                    add(engines[-1], f"pytorch {name} fp32 {n}", folder / f"{name}_none")
        calls["bandwidth"] = read_bandwidth()
        note(f"timing {len(calls)} programs, {options.rounds} rounds")
        times = interleave(calls, options.rounds)
        for engine in engines:
            engine.close()
        layers = expert_layers()
        expert_times = interleave(
            {name: partial(timed, program) for name, program in layers.items()}, 50
        )

    bandwidth = float(np.median(times.pop("bandwidth")))
    median = {name: float(np.median(t)) for name, t in times.items()}
    best = lambda start: min((v, k) for k, v in median.items() if k.startswith(start))  # noqa: E731
    floors = {name: TOKENS * step_bytes(name) / bandwidth * 1000 for name in MODELS}
    ours = {f"{n} {k}": best(f"ours {n} {k} ")[0] for n in MODELS for k in ("fp32", "int8")}
    goals = {
        "base fp32 / floor": goal(ours["base fp32"] / floors["base"], 1.3),
        "big fp32 / floor": goal(ours["big fp32"] / floors["big"], 1.2),
    }
    for name in ("ende_standard", "ende_fractional"):
        fp32, int8 = ours[f"{name} fp32"], ours[f"{name} int8"]
        goals[f"{name} fp32 / big fp32"] = goal(fp32 / ours["big fp32"], 0.33)
        goals[f"{name} int8 / fp32"] = goal(int8 / fp32, 0.7)
    modes = {}
    if "ctranslate2" in present:
        for name, fp32_goal, int8_goal in (("base", 0.7, 0.45), ("big", 0.45, 0.6)):
            theirs, modes[f"{name} fp32"] = best(f"ctranslate2 {name} float32 ")
            fastest, modes[name] = best(f"ctranslate2 {name} ")
            goals[f"{name} fp32 / CTranslate2 fp32"] = goal(
                ours[f"{name} fp32"] / theirs, fp32_goal
            )
            goals[f"{name} int8 / CTranslate2"] = goal(ours[f"{name} int8"] / fastest, int8_goal)
    ratio = np.median(expert_times["experts"]) / np.median(expert_times["dense"])
    goals["6 experts, one used / dense"] = goal(float(ratio), 1.1)
    goals["start s"] = goal(started["second_s"], 2.0)
    extra = started["peak_mb"] - started["weights_mb"]
    goals["peak MB beyond the weights"] = goal(extra, 400.0)
    result = {
        "benchmark": "cpu_latency",
        **machine(),
        "rounds": options.rounds,
        "ms": {name: spread(t) for name, t in times.items()},
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "floor_ms": floors,
        "ctranslate2_best": modes,
        "expert_layers_ms": {name: spread(t) for name, t in expert_times.items()},
        "start": started,
        "absent": [n for n in ("ctranslate2", "torch") if n not in present],
    }
    finish(result, goals)


if __name__ == "__main__":
    main()
