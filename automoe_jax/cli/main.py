"""The console command `automoe`: all commands of the project behind one name."""

import difflib
import os
import sys
from pathlib import Path

from automoe_jax.cli.process import leave_closed_pipe, run
from automoe_jax.system import shipped
from automoe_jax.system.version import __version__

# In the order in which one meets them; `automoe --help` lists them so.
COMMANDS = (
    "pipeline", "configs", "prepare", "train", "fit_latency", "search", "rank", "sensitivity",
    "halving", "routing", "distill", "export", "translate", "evaluate", "benchmark", "demo",
    "report", "watch", "describe", "convert",
)  # fmt: skip


def main():
    """Runs `automoe COMMAND ...` as `launch/COMMAND.py ...` runs it."""
    program, *arguments = sys.argv
    name = arguments[0].replace("-", "_") if arguments else "__help"
    if name in ("__help", "_h", "help"):
        try:
            print(help_text(), flush=True)
        except BrokenPipeError:
            leave_closed_pipe()
    elif name == "__version":
        print(f"automoe_jax {__version__}")
    elif name in COMMANDS:
        sys.argv = [f"{program} {arguments[0]}", *arguments[1:]]
        run(name)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(
            f"automoe: {arguments[0]!r} is not a command{hint} (automoe --help lists them)",
            file=sys.stderr,
        )
        sys.exit(2)


def help_text() -> str:
    """The commands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary(name)}" for name in COMMANDS]
    usage = "automoe COMMAND [options]; automoe COMMAND --help lists the options of one"
    start = "To start: automoe pipeline --config quickstart"
    return os.linesep.join([usage, "", *lines, "", start])


def summary(name: str) -> str:
    """The first sentence of a command's module, which is not imported for it."""
    return shipped.first_line(Path(__file__).with_name(f"{name}.py")).rstrip(".")
