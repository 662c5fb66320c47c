r"""Measures how well a supernet ranks its subnets.

python launch/rank.py --config configs/multi30k.py --workdir runs/multi30k --subnets=16 \
    --config.subnet_training.steps=600

Trains subnets from scratch, spread over the range of FLOPs, and compares their losses with those of
inherited weights: rank correlation, offset, a scatter plot, and what each choice changes of both.
With --bleu=500 translations are compared, too. With --ray the subnets are trained on the nodes of a
Ray cluster, all of which see the workdir.
"""

import dataclasses
from typing import Any

from absl import flags

from automoe_jax.architecture.subnet import from_json
from automoe_jax.cli import options, terminal
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.rank import FEWEST, RESULT, RankingSettings, rank
from automoe_jax.phases.run import RANK, check_out
from automoe_jax.phases.weights import supernet_params
from automoe_jax.search import sensitivity
from automoe_jax.system.errors import UserError

CONFIG = RunFlags(parts=True)
_OUT = flags.DEFINE_string("out", RANK, "folder in the workdir")
_SUBNETS = flags.DEFINE_integer("subnets", 12, "how many to train")
_BLEU = flags.DEFINE_integer(
    "bleu", 0, "sentences of validation text that each translates with inherited and with trained "
    "weights; 0: losses alone",
)  # fmt: skip
_TRAINED_IN = flags.DEFINE_string(
    "trained_in", "", "folder in the workdir of another ranking, of other weights of the supernet "
    "(final_weights), whose trained subnets are taken",
)  # fmt: skip
_JSON = options.define_json("print the result as one JSON line")


def main():
    config = CONFIG.load()
    if _SUBNETS.value < FEWEST:
        raise UserError(f"--subnets is {_SUBNETS.value}; give at least {FEWEST}")
    if _BLEU.value < 0:
        raise UserError(f"--bleu is {_BLEU.value}; give a number of sentences, or 0 for none")
    check_out(CONFIG.run(config), _OUT.value)
    if _TRAINED_IN.value:
        check_out(CONFIG.run(config), _TRAINED_IN.value, "--trained_in")
    CONFIG.require()
    training = config.subnet_training
    if not training.patience and training.final_weights != "best":  # only the last loss is used
        training = dataclasses.replace(training, eval_every=0)
    run = CONFIG.open_run(dataclasses.replace(config, subnet_training=training))
    data = prepare(run)
    params, step = supernet_params(run, data.tokenizer.vocab_sizes)
    settings = RankingSettings(_SUBNETS.value, _BLEU.value, _TRAINED_IN.value)
    result = rank(run, _OUT.value, data, params, step, settings)
    if _JSON.value:
        terminal.print_json(result)
        return
    _print_subnets(result)
    print(
        f"Kendall's tau {result['tau']:.3f} [{result['tau_low']:.3f}, {result['tau_high']:.3f}], "
        f"Spearman {result['spearman']:.3f}, inherited less trained loss {result['offset']:+.3f} "
        f"nats a token; the supernet's first choice is {result['regret']:.4f} nats from the best"
    )
    print(f"the supernet is {result['verdict']}")
    if corrected := result.get("corrected"):  # files of earlier versions have none
        print(
            f"each corrected by the others: Kendall's tau {corrected['tau']:.3f}; standard "
            f"deviation of inherited less trained losses {corrected['error']:.4f} nats in place of "
            f"{corrected['error_inherited']:.4f}; a search corrects them with "
            f"--config.search.calibration={run.path / _OUT.value / RESULT}"
        )
    _print_effects(result)
    print(f"picture: {run.path / _OUT.value / 'rank.png'}")


def _print_subnets(result: dict[str, Any]):
    """Their losses, and BLEU where it is known."""
    bleu = result.get("bleu")  # files of earlier versions have none
    header = ["subnet", "GFLOPs", "inherited loss", "trained loss"]
    columns = {"gflops": ".4g", "inherited": ".4f", "trained": ".4f"}
    if bleu:
        header += ["inherited BLEU", "trained BLEU"]
        columns |= {"bleu_inherited": ".2f", "bleu_trained": ".2f"}
    terminal.print_table(header, (
        (str(i), *(format(row[name], digits) for name, digits in columns.items()))
        for i, row in enumerate(result["subnets"], 1)
    ))  # fmt: skip
    if bleu:
        print(
            f"BLEU on {bleu['sentences']} validation sentences: inherited and trained differ by "
            f"{bleu['mean_difference']:.2f} on average; Kendall's tau {bleu['tau']:.3f}"
        )


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
