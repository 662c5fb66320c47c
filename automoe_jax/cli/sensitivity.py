"""Says what each choice of a search space is worth.

python launch/sensitivity.py --workdir=runs/multi30k

Scores random subnets of the workdir's supernet with inherited weights, and tells for each choice
which share of the variance of loss and latency it explains, and what it buys.
"""

from absl import flags

from automoe_jax import config as settings
from automoe_jax.cli import options, terminal
from automoe_jax.cli.terminal import TerminalProgress
from automoe_jax.phases import sensitivity
from automoe_jax.phases.run import CACHE, RANK, SUPERNET, open_run
from automoe_jax.search.sensitivity import Worth
from automoe_jax.system import compile_cache, files, workdir
from automoe_jax.system.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run with a trained supernet")
_SUBNETS = flags.DEFINE_integer("subnets", 300, "how many to score", lower_bound=1)
_PAIRS = flags.DEFINE_integer(
    "pairs", 500, "validation pairs to score on; 0 for all", lower_bound=0
)
_LAYERS = flags.DEFINE_bool("layers", False, "print the choices of each layer, not of each side")
_JSON = options.define_json("print the result as one JSON line")


def main():
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the folder of a run")
    folder = files.expanded(_WORKDIR.value).absolute()
    if not folder.exists():
        raise UserError(f"--workdir={_WORKDIR.value} does not exist; name the folder of a run")
    if not (folder / SUPERNET / workdir.MANIFEST).exists():
        raise UserError(f"--workdir={_WORKDIR.value} has no supernet; train one first")
    groups = workdir.settings(folder / SUPERNET, SUPERNET)
    run = open_run(settings.from_stored(groups), folder, TerminalProgress())
    compile_cache.enable_for_run(run.path / CACHE)
    analysis = sensitivity.analyse(run, _SUBNETS.value, _PAIRS.value)
    if _JSON.value:
        terminal.print_json(analysis.as_json())
        return
    found, unit = analysis.found, analysis.unit
    header = ("choice", "values", "of loss", "of cost", "nats", "95 %", unit, f"gain per {unit}")
    terminal.print_table(header, map(_row, found.layers if _LAYERS.value else found.sides))
    print(
        "shares of the variance that each choice explains; nats and cost change from its lowest to "
        "its highest value"
    )
    print(
        f"{found.subnets} subnets; by layer, choices explain {found.loss_explained:.0%} of the "
        f"loss's variance and {found.cost_explained:.0%} of the cost's ({analysis.how})"
    )
    if analysis.ranked:
        print(f"inherited and trained losses of the subnets in {RANK}/:")
        terminal.print_effects(analysis.ranked)
    idle = ", ".join(w.choice for w in found.sides if not w.buys)
    print(f"more of these buys nothing: {idle}" if idle else "more of every choice buys something")
    print(f"picture: {run.path / sensitivity.FOLDER / sensitivity.PICTURE}")


def _row(worth: Worth) -> tuple[str, ...]:
    gain = worth.gain_per_cost
    return (
        worth.choice, f"{worth.low:,.4g} to {worth.high:,.4g}", f"{worth.loss_share:.1%}",
        f"{worth.cost_share:.1%}", f"{worth.loss:+.4f}",
        f"{worth.loss_low:+.4f}, {worth.loss_high:+.4f}", f"{worth.cost:+.3g}",
        "" if gain is None else f"{gain:.3g}",
    )  # fmt: skip
