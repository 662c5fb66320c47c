"""Runs all phases in one workdir: supernet, search, finalists, export, report.

python launch/pipeline.py --config configs/quickstart.py
"""

from rich.table import Table

from automoe_jax.cli import options, terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.phases import pipeline
from automoe_jax.phases import run as phases
from automoe_jax.report.page import table_rows
from automoe_jax.system import compile_cache

CONFIG = ConfigFlag()
_WORKDIR = options.define_workdir()
_JSON = options.define_json("print the results as one JSON line")


def main():
    config = CONFIG.load()
    folder = _WORKDIR.value or CONFIG.default_workdir
    compile_cache.enable(phases.open_run(config, folder) / phases.CACHE)
    results = pipeline.run(config, folder, terminal.TerminalProgress())
    if _JSON.value:
        terminal.print_json(results)
        return
    header, *rows = table_rows(results)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    # Wide enough for the table where the output is not a terminal.
    terminal.print_table(table)
    random, test = results["random"], results["test"]
    print(f"searched subnet, trained: test BLEU {test['bleu']:.2f}, chrF {test['chrf']:.2f}")
    print(f"  {test['bleu_signature']}")
    if random["median_loss"] is not None:
        print(
            f"inherited validation loss {results['searched_loss']:.4f}; median of "
            f"{random['count']} random subnets within the limit {random['median_loss']:.4f}"
        )
    print(f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in results['seconds'].items())}")
    print(f"export: {folder}/export   report: {folder}/report/index.html")
