r"""Measures how well a supernet ranks its subnets.

python launch/rank.py --config configs/multi30k.py --workdir runs/multi30k --subnets=16 \
    --config.subnet_training.steps=600

Trains subnets from scratch, spread over the range of FLOPs, and compares their losses with those of
inherited weights: rank correlation, offset, a scatter plot, and what each choice changes of both.
With --ray the subnets are trained on the nodes of a Ray cluster, all of which see the workdir.
"""

import dataclasses
from typing import Any

from absl import flags

from automoe_jax.architecture.subnet import from_json
from automoe_jax.cli import options, terminal
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.rank import FEWEST, rank
from automoe_jax.phases.run import RANK, check_out
from automoe_jax.phases.weights import supernet_params
from automoe_jax.search import sensitivity
from automoe_jax.system.errors import UserError

CONFIG = RunFlags(parts=True)
_OUT = flags.DEFINE_string("out", RANK, "folder in the workdir")
_SUBNETS = flags.DEFINE_integer("subnets", 12, "how many to train")
_JSON = options.define_json("print the result as one JSON line")


def main():
    config = CONFIG.load()
    if _SUBNETS.value < FEWEST:
        raise UserError(f"--subnets is {_SUBNETS.value}; give at least {FEWEST}")
    check_out(CONFIG.run(config), _OUT.value)
    CONFIG.require()
    # Only the loss at the end is used.
    training = dataclasses.replace(config.subnet_training, eval_every=0)
    run = CONFIG.open_run(dataclasses.replace(config, subnet_training=training))
    data = prepare(run)
    params, step = supernet_params(run, data.tokenizer.vocab_sizes)
    result = rank(run, _OUT.value, data, params, step, _SUBNETS.value)
    if _JSON.value:
        terminal.print_json(result)
        return
    rows = (
        (str(i), f"{row['gflops']:.4g}", f"{row['inherited']:.4f}", f"{row['trained']:.4f}")
        for i, row in enumerate(result["subnets"], 1)
    )
    terminal.print_table(("subnet", "GFLOPs", "inherited loss", "trained loss"), rows)
    print(
        f"Kendall's tau {result['tau']:.3f} [{result['tau_low']:.3f}, {result['tau_high']:.3f}], "
        f"Spearman {result['spearman']:.3f}, inherited less trained loss {result['offset']:+.3f} "
        f"nats a token; the supernet's first choice is {result['regret']:.4f} nats from the best"
    )
    print(f"the supernet is {result['verdict']}")
    _print_effects(result)
    print(f"picture: {run.path / _OUT.value / 'rank.png'}")


def _print_effects(result: dict[str, Any]):
    """What each choice changes, or how many subnets it takes to know."""
    if changes := result.get("effects"):  # files of earlier versions have none
        terminal.print_effects(changes)
        return
    subnets = [from_json(row["subnet"]) for row in result["subnets"]]
    print(
        f"what each choice changes is not known from {len(subnets)} subnets; it takes "
        f"--subnets={sensitivity.fewest_paired(subnets)} or more (with another --out)"
    )
