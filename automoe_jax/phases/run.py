"""A run: its settings, its workdir and its progress; starting and continuing its folders."""

import dataclasses
import functools
import platform
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from automoe_jax.config import RunConfig
from automoe_jax.system import compile_cache, locks, workdir
from automoe_jax.system.bucket import Bucket
from automoe_jax.system.errors import UserError
from automoe_jax.system.parts import HERE, P, R, Workers
from automoe_jax.system.progress import Progress, Silent

# Folders and files of a workdir.
SUPERNET, SUBNET, SEARCH = "supernet", "subnet", "search"
EXPORT, REPORT, RANK = "export", "report", "rank"
LATENCY_MODEL = "latency_model.json"
CACHE = ".jax_cache"  # compiled programs


@dataclasses.dataclass(frozen=True)
class Run:
    """All settings, the workdir, the receiver of notes and progress bars, and who does parts."""

    config: RunConfig
    path: Path
    progress: Progress
    workers: Workers = HERE  # of trainings and other parts that do not depend on each other
    bucket: Bucket | None = None  # whose copy the workdir is

    def stored(self, folder: Path) -> str:
        """A folder as manifests say it: relative if in the workdir, which may be moved."""
        inside = folder.is_relative_to(self.path)
        return str(folder.relative_to(self.path) if inside else folder.absolute())

    @property
    def corpus(self) -> Path:
        return self.path / "corpus"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def supernet(self) -> Path:
        return self.path / SUPERNET


def open_run(
    config: RunConfig,
    folder: str | Path,
    progress: Progress,
    workers: Workers = HERE,
    bucket: Bucket | None = None,
) -> Run:
    """Starts or continues a workdir, and locks it until this process ends.

    `UserError` if another config made it, or another process holds its lock.
    """
    run = Run(config, workdir.resolve(folder), progress, workers, bucket)
    if (run.path / workdir.MANIFEST).exists():
        workdir.read(run.path, "run")  # refuses an export, for example, before it is touched
    hold(run)
    begun = run.tokenizer.exists()
    if is_converted(run.path) and not run.tokens.is_dir():
        # The tokenizer came with the weights: the corpus may still be changed.
        begun = False
        stored = workdir.settings(run.path, "run")["data"]
        if not workdir.same(stored, config.data) and jax.process_index() == 0:
            shutil.rmtree(run.corpus, ignore_errors=True)
    claim(run, run.path, "run", config.groups("seed", "data", "tokenizer"), begun=begun)
    return run


def each_part(run: Run, work: Callable[[Run, P], R], parts: Iterable[P]) -> Iterator[tuple[int, R]]:
    """Has the run's workers do `work(run, part)`, as `Workers.each`.

    All of them see the workdir at the same path.
    """
    if not run.workers.remote:
        return run.workers.each(functools.partial(work, run), parts)
    own = dataclasses.replace(run, progress=Silent(), workers=HERE)
    return run.workers.each(functools.partial(_in_worker, work, own), parts)


def _in_worker(work: Callable[[Run, P], R], run: Run, part: P) -> R:
    if not (run.path / workdir.MANIFEST).exists():
        raise UserError(
            f"{run.path} is not on {platform.node()}, a node of the Ray cluster; use a --workdir "
            "that all nodes see"
        )
    compile_cache.enable_for_run(run.path / CACHE)
    return work(run, part)


def check_out(run: Run, name: str, flag: str = "--out"):
    """`UserError` unless the name given with a flag is that of a folder for results in a run."""
    kept = [path.name for path in (run.corpus, run.tokenizer, run.tokens)]
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or parts[0] in (*kept, CACHE):
        raise UserError(
            f"{flag} is {name!r}; give the name of a folder in the workdir, other than "
            f"{', '.join(kept)}"
        )


def hold(run: Run):
    """Locks the workdir for this process; in a pod for all of its processes, by the first."""
    if jax.process_index() == 0:
        locks.hold(run.path)


def is_converted(path: Path) -> bool:
    """True if a workdir was made from a published checkpoint (`phases.convert`)."""
    return (path / workdir.MANIFEST).exists() and workdir.CONVERTED in workdir.read(path, "run")


def claim(
    run: Run,
    folder: str | Path,
    kind: str,
    content: dict[str, Any],
    *,
    begun: bool,
    added: Collection[str] = (),
):
    """Starts or continues a folder: `workdir.claim` in the first process, others wait for it.

    `folder` is absolute, or relative to the workdir; `content` is all settings that decide what
    it will hold; `begun` is true if it holds results of the settings in its manifest. `UserError`
    if it was begun with other settings.
    """
    path = run.path / folder
    if jax.process_index() == 0:
        workdir.claim(path, kind, content, begun=begun, added=added)
    after_first(run, f"claim {run.stored(path)}")


def after_first(run: Run, what: str):
    """The processes of a pod wait until the first has written `what`, and then see it."""
    if jax.process_count() == 1:
        return
    if run.bucket is not None and jax.process_index() == 0:
        run.bucket.push()
    multihost_utils.sync_global_devices(what)
    if run.bucket is not None and jax.process_index() > 0:
        run.bucket.pull(exact=True)
