"""What the step of the paper's space needs on TPUs, compiled for them without any.

pip install '.[tpu]'
python benchmarks/topologies.py --json                      # 5 minutes for each case, on two cores
python benchmarks/topologies.py --json --only=plain

Each case compiles the step of configs/wmt14.py with some settings for a slice, and counts by
`automoe_jax.system.hlo` what an update of the largest subnet computes, moves and sends on a chip.
It is a line of benchmarks/results/topologies.jsonl; what has one is not compiled again.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import measure
from trainings import ROOT

from automoe_jax.cli import process
from automoe_jax.config import RunConfig, resolve
from automoe_jax.data.plan import Bucket
from automoe_jax.data.tokenizers.loading import vocab_sizes
from automoe_jax.phases import topology as topologies
from automoe_jax.phases.weights import target
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.training.target import TrainingTarget, abstract_state

CONFIG = "configs/wmt14.py"
RESULTS = ROOT / "benchmarks" / "results" / "topologies.jsonl"
LENGTH = 30
ZERO = {"training.shard_optimizer": True}
BF16 = {"training.compute_dtype": "bfloat16"}
POD = "v5e:16x16"
SPREAD = {"training.expert_parallel": 16, "sampling.unit": "update"}
# With 64 experts in each of 6 + 6 layers of width 640, 4.0 billion weights.
WIDE = {"space.encoder_ffn_dims": (1024, 4096), "space.decoder_ffn_dims": (1024, 4096)}


def experts(n: int) -> dict[str, Any]:
    """Layers of up to n experts."""
    return {"space.encoder_experts": (1, n), "space.decoder_experts": (1, n)}


class Case(NamedTuple):
    """Settings beside the config's, the slice, and tokens of a chip."""

    settings: dict[str, Any]
    slice: str = "v5e:2x4"
    tokens: int = 4096


CASES = {
    "plain": Case({}),
    "bfloat16": Case(BF16),
    "zero": Case(BF16 | ZERO),
    "long": Case(BF16 | ZERO, tokens=16_384),
    "pod": Case(BF16 | ZERO, POD),
    "experts_16": Case(BF16 | ZERO | experts(16), POD),
    "experts_64": Case(BF16 | ZERO | experts(64) | WIDE | SPREAD, POD),
    # The most experts that take 16 GB (1e9 bytes), with all on each chip, the state cut, experts
    # spread; and what is next, which takes more.
    "most_copied": Case(BF16 | experts(16), POD),
    "over_copied": Case(BF16 | experts(17), POD),
    "most_cut": Case(BF16 | ZERO | experts(43), POD),
    "over_cut": Case(BF16 | ZERO | experts(44), POD),
    "most_spread": Case(BF16 | ZERO | experts(144) | WIDE | SPREAD, POD),
    "over_spread": Case(BF16 | ZERO | experts(160) | WIDE | SPREAD, POD),
    # Parts of "zero", for what the compiler's time goes to.
    "remat": Case(BF16 | ZERO | {"training.remat": "layer"}),
    "one_width": Case(
        BF16 | ZERO | {"space.encoder_embed_dims": (640,), "space.decoder_embed_dims": (640,)}
    ),
    "one_size": Case(
        BF16 | ZERO | {"space.encoder_ffn_dims": (3072,), "space.decoder_ffn_dims": (3072,)}
    ),
}
GOALS = {
    "gb_moved": 25,
    "compile_s": 120,
    "weights": 4,
}
# GB of a chip; at least so many of what a chip should not hold.
MEMORY = {"pod": 6, "experts_16": 12, "experts_64": 16}
MEMORY |= {name: 16 for name in CASES if name.startswith(("most_", "over_"))}


def config_of(case: Case) -> RunConfig:
    """The config of a case, with one batch for each chip."""
    config = runpy.run_path(str(ROOT / CONFIG))["get_config"]()
    for name, value in case.settings.items():
        group, field = name.split(".")
        config[group][field] = value
    config.training.tokens_per_batch = case.tokens
    config.training.batches_per_step = 1
    return resolve(config)


def compile_case(case: Case) -> dict[str, Any]:
    """What a case needs, and what bounds it."""
    config = config_of(case)
    topology = topologies.find(case.slice)
    model = target(config, vocab_sizes(config.tokenizer))
    bucket = Bucket(case.tokens // LENGTH, LENGTH, LENGTH)
    compiled = topologies.compile_step(model, config, config.training, topology, bucket)
    for line in topologies.describe(compiled, topology, bucket, config.training):
        print(line, file=sys.stderr)
    seconds = topologies.bounds(compiled.costs, topology.chip)
    used, _ = topologies.memory_parts(compiled.memory)
    return {
        "slice": case.slice,
        "tokens_per_chip": case.tokens,
        "settings": case.settings,
        "compile_s": round(compiled.seconds, 1),
        "weights": parameters(model, config),
        "gb": round(used / 1e9, 2),
        "tflop": round(compiled.costs.flops / 1e12, 3),
        "gb_moved": round(compiled.costs.memory_bytes / 1e9, 2),
        "gb_sent": round(sum(compiled.costs.sent.values()) / 1e9, 3),
        "ms_at_least": {name: round(1e3 * s, 2) for name, s in seconds.items()},
        "compute_share": round(seconds["compute"] / max(seconds.values()), 3),
        "weights_moved_by_rows": dict(topologies.moved_experts(compiled.text, config)),
    }


def parameters(model: TrainingTarget, config: RunConfig) -> int:
    """The number of weights of a supernet."""
    state = abstract_state(model, config.training, config.seed)
    return sum(x.size for x in jax.tree.leaves(state.params))


def goals_of(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The goals that the cases speak of."""
    found = {}
    if row := rows.get("zero"):
        moved = row["gb_moved"]
        found["GB moved, bfloat16, 4,096 tokens"] = measure.goal(moved, GOALS["gb_moved"])
        found["seconds to compile"] = measure.goal(row["compile_s"], GOALS["compile_s"])
        by_rows = sum(row["weights_moved_by_rows"].values())
        found["gathers and scatters of experts' weights"] = measure.goal(by_rows, 0)
    if row := rows.get("long"):
        share = row["compute_share"]
        found["share of compute, 16,384 tokens"] = measure.goal(share, 0.3, at_most=False)
    for name, most in MEMORY.items():
        if row := rows.get(name):
            at_most = not name.startswith("over_")
            found[f"GB a chip, {name}"] = measure.goal(row["gb"], most, at_most=at_most)
    if row := rows.get("experts_64"):
        weights = row["weights"] / 1e9
        found["billions of weights"] = measure.goal(weights, GOALS["weights"], at_most=False)
    return found


def main():
    process.prepare(compiling=True)  # as launch/train.py compiles
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of finished cases")
    args = parser.parse_args()
    chosen = measure.names(args.only, CASES)
    jax.config.update("jax_platforms", "cpu")  # libtpu would be asked for a TPU of this machine
    known = {line["case"]: line for line in files.read_json_lines(args.results)}
    for name in chosen:
        if name not in known:
            try:
                found = compile_case(CASES[name])
            except UserError as e:  # no chip holds it; it is said, and tried again another time
                print(f"{name}: {e}", file=sys.stderr)
                continue
            known[name] = {"case": name, **found, **measure.machine()}
            files.append_json_line(args.results, known[name])
            print(f"{name}: {json.dumps(known[name])}", file=sys.stderr)
    rows = {name: known[name] for name in chosen if name in known}
    measure.finish({"benchmark": "topologies", "rows": rows}, goals_of(rows))


if __name__ == "__main__":
    main()
