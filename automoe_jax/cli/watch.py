"""Shows how the trainings of a run go: a table that refreshes, or a page of curves.

python launch/watch.py --workdir=runs/wmt14
python launch/watch.py --workdir=runs/wmt14 --html=curves.html
"""

import contextlib
import time
from pathlib import Path

from absl import flags
from rich.live import Live

from automoe_jax.cli import terminal
from automoe_jax.report import curves
from automoe_jax.system import bucket, files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.training import metrics

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_HTML = flags.DEFINE_string("html", None, "file to write a page of curves to; no table")
_EVERY = flags.DEFINE_float("every", 5.0, "seconds between two looks", lower_bound=0.1)
_ONCE = flags.DEFINE_bool(
    "once", False, "print the table once; so it is where stdout is not a terminal"
)


def main():
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the folder of a run")
    folder = _folder()
    if not folder.is_dir():
        raise UserError(f"--workdir={folder} does not exist; name the folder of a run")
    found = _trainings(folder)
    if _HTML.value:
        page = curves.page(str(folder), *_read(folder, found))
        files.write_text(files.expanded(_HTML.value), page)
        print(f"curves written: {_HTML.value}")
        return
    if _ONCE.value or not terminal.is_terminal():
        terminal.print_table(*_rows(folder, found))
        return
    shown = terminal.table(*_rows(folder, found))
    # Ctrl-C is how one stops watching.
    with contextlib.suppress(KeyboardInterrupt), Live(shown, auto_refresh=False) as live:
        while True:
            time.sleep(_EVERY.value)
            live.update(terminal.table(*_rows(_folder(), _trainings(folder))), refresh=True)


def _folder() -> Path:
    """The run's folder; of one in a bucket a copy of what is shown, as new as the bucket is."""
    shown = {metrics.NAME, workdir.MANIFEST}
    return bucket.folder_of(_WORKDIR.value or "", lambda name: Path(name).name in shown)


def _trainings(folder: Path) -> list[Path]:
    """The folders of the run with metrics; `UserError` if there is none."""
    found = sorted(folder.rglob(metrics.NAME), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{folder} has no {metrics.NAME}: nothing was trained there yet")
    return [path.parent for path in found]


def _read(folder: Path, trainings: list[Path]) -> tuple[dict[str, curves.Lines], dict[str, int]]:
    """Lines of the metrics, and steps in all, of each training."""
    names = [str(path.relative_to(folder)) for path in trainings]
    lines = {name: metrics.read(path) for name, path in zip(names, trainings, strict=True)}
    return lines, dict(zip(names, map(_steps, trainings), strict=True))


def _steps(training: Path) -> int:
    """The steps that a training is to take, as its manifest says."""
    config = files.read_json(training / workdir.MANIFEST, "manifest")["config"]
    return (config.get("training") or config["subnet_training"])["steps"]


def _rows(folder: Path, trainings: list[Path]) -> tuple[list[str], list[list[str]]]:
    header, *rows = curves.table(*_read(folder, trainings))
    return header, rows
