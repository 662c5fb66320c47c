"""What subnets of each decoder depth and width inherit from supernets that were trained otherwise.

python launch/train.py --config configs/systems.py:msdocs:automoe --workdir=runs/plain \\
    --config.sampling.depth_bias=0
python launch/train.py --config configs/systems.py:msdocs:automoe --workdir=runs/deep
python benchmarks/supernet_depths.py --json runs/plain runs/deep

Scores, on all validation text, dense subnets (one FFN of 512 a layer; four encoder layers) of all
decoder depths and widths of the space, and 30 fixed random subnets. One line of the results file
for each workdir; one whose settings have a line is not scored again.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import measure
import numpy as np
import supernet_options
import trainings
from trainings import ROOT

from automoe_jax.architecture.subnet import from_json
from automoe_jax.config import RunConfig
from automoe_jax.system import files
from automoe_jax.training import sampling
from automoe_jax.training.config import SamplingConfig

RESULTS = ROOT / "benchmarks" / "results" / "supernet_depths.jsonl"
ENCODER_DEPTH, FFN = 4, 512


def changed(config: SamplingConfig) -> dict[str, Any]:
    """The fields that are not the defaults."""
    plain = dataclasses.asdict(SamplingConfig())
    own = dataclasses.asdict(config)
    return {name: value for name, value in own.items() if value != plain[name]}


def scored(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The losses of a workdir's supernet, trained by `config`."""
    space = config.space
    choices = list(itertools.product(space.decoder_depths, space.decoder_embed_dims))
    encoder_width = max(space.encoder_embed_dims)
    subnets = [
        from_json(trainings.dense((encoder_width, width), (ENCODER_DEPTH, depth), FFN))
        for depth, width in choices
    ]
    for subnet in subnets:
        space.validate(subnet)
    subnets += sampling.fixed_set(space, 0, supernet_options.RANDOM)
    losses = supernet_options.inherited(folder, subnets)
    by_choice = [[*choice, loss] for choice, loss in zip(choices, losses, strict=False)]
    return {
        "sampling": changed(config.sampling),
        "updates": config.training.steps,
        "seed": config.seed,
        "losses": by_choice,  # decoder layers, decoder width, loss
        "random": float(np.mean(losses[len(choices) :])),
        **measure.machine(),
    }


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="accepted; output is JSON in any case")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("workdirs", type=Path, nargs="+")
    args = parser.parse_args()
    lines = files.read_json_lines(args.results)
    for folder in args.workdirs:
        config = supernet_options.stored_config(folder)
        about = changed(config.sampling), config.training.steps, config.seed
        if about in [(x["sampling"], x["updates"], x["seed"]) for x in lines]:
            continue
        lines.append(scored(folder, config))
        files.append_json_line(args.results, lines[-1])
    print(json.dumps({"benchmark": "supernet_depths", "rows": lines}))


if __name__ == "__main__":
    main()
