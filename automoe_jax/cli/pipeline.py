"""Runs all phases in one workdir: supernet, search, finalists, export, report.

python launch/pipeline.py --config configs/quickstart.py

With --ray the finalists are trained, and a text is distilled, on the nodes of a Ray cluster, all of
which see the workdir; latencies are measured here.
"""

from automoe_jax.cli import options, terminal
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases.pipeline import run_pipeline
from automoe_jax.report.page import gain_text, table_rows

CONFIG = RunFlags(parts=True)
_JSON = options.define_json("print the results as one JSON line")


def main():
    run = CONFIG.open_run(CONFIG.load())
    results = run_pipeline(run)
    if _JSON.value:
        terminal.print_json(results)
        return
    header, *rows = table_rows(results)
    terminal.print_table(header, rows)
    random, test = results["random"], results["test"]
    print(f"searched subnet, trained: test BLEU {test['bleu']:.2f}, chrF {test['chrf']:.2f}")
    print(f"  {test['bleu_signature']}")
    if gain := gain_text(results):
        print(f"  {gain}")
    if random["median_loss"] is not None:
        print(
            f"inherited validation loss {results['searched_loss']:.4f}; median of "
            f"{random['count']} random subnets within the limit {random['median_loss']:.4f}"
        )
    print(f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in results['seconds'].items())}")
    folder = CONFIG.given_path
    print(f"export: {folder}/export   report: {folder}/report/index.html")
