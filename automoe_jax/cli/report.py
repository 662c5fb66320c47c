"""Compares runs on one page: quality against latency, a table, architectures, trainings.

python launch/report.py runs/a runs/b --out=comparison
python launch/report.py benchmarks/results/paper_CORPUS.jsonl --out=comparison

Takes workdirs of finished pipelines, and result files of benchmarks/paper_tables.py. Writes
index.html, which needs no other file and no network, and its picture as PNG and SVG.
"""

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.phases.comparison import compare
from automoe_jax.phases.report import RESULTS
from automoe_jax.report.comparison import PAGE
from automoe_jax.report.systems import grouped, table
from automoe_jax.system import bucket, files
from automoe_jax.system.errors import UserError

# The runs, from the command line.
ARGUMENTS: list[str] = []
_SHOWN = ("system", "seeds", "GFLOPs", "ms fp32", "speed-up", "BLEU fp32", "ms int8", "BLEU int8")
_OUT = flags.DEFINE_string("out", "comparison", "folder to write")
_TITLE = flags.DEFINE_string("title", "Systems side by side", "headline of the page")
_JSON = options.define_json()


def main():
    if not ARGUMENTS:
        raise UserError("no run is given; name workdirs, or a result file of paper_tables.py")
    folder = files.expanded(_OUT.value)
    if (folder / RESULTS).exists():
        raise UserError(f"--out={_OUT.value} is the report of a pipeline; name another folder")
    rows = compare([bucket.folder_of(path) for path in ARGUMENTS], folder, _TITLE.value)
    header, *cells = table(grouped(rows))
    if _JSON.value:
        terminal.print_json([dict(zip(header, line, strict=True)) for line in cells])
        return
    shown = [header.index(name) for name in _SHOWN]
    terminal.print_table(_SHOWN, ([line[i] for i in shown] for line in cells))
    print(f"written: {folder / PAGE}")
