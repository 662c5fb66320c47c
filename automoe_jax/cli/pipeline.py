"""Runs all phases in one workdir: supernet, search, finalists, export, report.

python launch/pipeline.py --config configs/quickstart.py
"""

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from automoe_jax.cli import process as common
from automoe_jax.system import malloc as huge_pages

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: runs/<config>)")
_JSON = flags.DEFINE_bool("json", False, "print the results as one JSON line")


def main():
    huge_pages.use()
    common.set_jax_defaults()
    config = common.load_config(_CONFIG)
    from automoe_jax.phases import pipeline  # noqa: PLC0415
    from automoe_jax.phases import run as phases  # noqa: PLC0415
    from automoe_jax.report.page import table_rows  # noqa: PLC0415
    from automoe_jax.system import compile_cache  # noqa: PLC0415

    folder = _WORKDIR.value or common.default_workdir()
    compile_cache.enable(phases.open_run(config, folder) / phases.CACHE)
    results = pipeline.run(config, folder, common.TerminalProgress())
    if _JSON.value:
        common.print_json(results)
        return
    header, *rows = table_rows(results)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    # Wide enough for the table where the output is not a terminal.
    Console(width=None if Console().is_terminal else 120).print(table)
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
