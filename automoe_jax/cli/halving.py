"""Chooses among candidates by short trainings: successive halving.

python launch/halving.py --config configs/msdocs.py --workdir runs/msdocs --subnets=8 --steps=150
python launch/halving.py --config FILE --workdir DIR --candidates=best_1.json,best_2.json,dense.json

Trains all candidates a little, from the workdir's supernet where there is one or from what
--init_from names, then the better half for twice as long, and so on: for a choice that inherited
losses do not tell. With --ray the candidates of a round are trained on the nodes of a Ray cluster,
all of which see the workdir and that of --init_from.
"""

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.cli.run_flags import RunFlags, named_folder
from automoe_jax.phases import halving
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.rank import FEWEST, spread
from automoe_jax.phases.run import check_out
from automoe_jax.published import subnet_files
from automoe_jax.system.errors import UserError

CONFIG = RunFlags(parts=True)
_OUT = flags.DEFINE_string("out", "halving", "folder in the workdir")
_SUBNETS = flags.DEFINE_integer(
    "subnets", 8, "random candidates, spread over the range of FLOPs, in place of --candidates"
)
_CANDIDATES = flags.DEFINE_list("candidates", [], "subnet files to choose among, with commas")
_STEPS = flags.DEFINE_integer("steps", 150, "updates of the first round", lower_bound=1)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "workdir that candidates start from, in place of this one's supernet: the weights of its "
    "supernet, or of its trained subnet, which differs in experts alone (sparse upcycling)",
)
_JSON = options.define_json("print the result as one JSON line")


def main():
    options.refuse_beside(_CANDIDATES, _SUBNETS)
    config = CONFIG.load()
    if _CANDIDATES.value:
        width = config.space.qkv_dim
        loaded = (subnet_files.load(path, width) for path in _CANDIDATES.value)
        subnets = list(dict.fromkeys(loaded))
        if len(subnets) < 2:
            raise UserError("--candidates names fewer than 2 different subnets; give at least 2")
        for subnet in subnets:
            config.space.validate(subnet)
    else:
        if _SUBNETS.value < FEWEST:
            raise UserError(
                f"--subnets is {_SUBNETS.value}; give at least {FEWEST}, or name two or more with "
                "--candidates"
            )
        subnets = spread(config.space, _SUBNETS.value, config.seed)
    check_out(CONFIG.run(config), _OUT.value)
    run = CONFIG.open_run(config)
    init_from = named_folder(_INIT_FROM)
    prepare(run, init_from)
    result = halving.halve(run, _OUT.value, subnets, _STEPS.value, init_from)
    if _JSON.value:
        terminal.print_json(result)
        return
    n_rounds = max(len(row["losses"]) for row in result["subnets"])
    rows = [
        (str(i), f"{row['gflops']:.4g}",
         *(f"{loss:.4f}" for loss in row["losses"]), *[""] * (n_rounds - len(row["losses"])))
        for i, row in enumerate(result["subnets"], 1)
    ]  # fmt: skip
    rounds = [f"round {n}" for n in range(1, n_rounds + 1)]
    terminal.print_table(("rank", "GFLOPs", *rounds), rows)
    start = "the supernet's weights" if result["inherit"] else result.get("init_from") or "scratch"
    cost = f"{result['updates']:,} updates in all"
    if "seconds" in result:  # files of earlier versions have none
        cost += f", {result['seconds']:.0f} s of training"
    print(f"validation losses, nats a token; {cost}, from {start}")
    print(f"the best: {run.path / _OUT.value / halving.BEST}")
