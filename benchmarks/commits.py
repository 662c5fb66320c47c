"""Commits checked out side by side: their programs, interleaved timing, and a record to resume."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from child import Child
from measure import goal

ROOT = Path(__file__).resolve().parent.parent
Item = TypeVar("Item")
QUICKSTART = "configs/quickstart.py"


def note(text: str):
    """Prints progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def git(*arguments: str) -> bytes:
    """Standard output of a git command in this repository; `SystemExit` where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def full_hash(revision: str) -> str:
    """The commit that a branch, tag or abbreviation names."""
    return git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()


@dataclasses.dataclass(frozen=True)
class Checkout:
    """The sources of a commit, run by this interpreter with its installed dependencies.

    Attributes:
      name: "before" or "after".
      source: folder of the commit's files.
      work: folder for what its programs write.
    """

    name: str
    source: Path
    work: Path

    def environment(self) -> dict[str, str]:
        """This process's, with the commit's code first on the path and no compilation cache."""
        environment = {**os.environ, "PYTHONPATH": str(self.source)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        return environment

    def python(self, *arguments: str | Path) -> float:
        """Wall seconds of a Python process in the commit's folder; its output goes to a log."""
        command = [sys.executable, *map(str, arguments)]
        log = self.work / "log.txt"
        with log.open("a", encoding="utf-8") as f:
            print("\n$", *command, file=f, flush=True)
            start = time.perf_counter()
            done = subprocess.run(
                command, cwd=self.source, env=self.environment(), stdout=f, stderr=f, check=False
            )
        if done.returncode:
            sys.exit(f"{self.name}: {' '.join(command)} exited with {done.returncode}; see {log}")
        return time.perf_counter() - start

    def launch(self, program: str, *flags: str) -> float:
        """Wall seconds of a program of `launch/`."""
        return self.python(self.source / "launch" / f"{program}.py", *flags)

    def child(self, *arguments: str | Path, **environment: str) -> Child:
        """A Python process of the commit that answers requests; stderr goes to the log."""
        with (self.work / "log.txt").open("a", encoding="utf-8") as log:
            return Child(
                [sys.executable, *map(str, arguments)],
                {**self.environment(), **environment},
                cwd=self.source,
                stderr=log,
            )


def check_out(name: str, commit: str, workdir: Path) -> Checkout:
    """Writes a commit's files to `workdir/sources/NAME`, once; checks that they are imported."""
    checkout = Checkout(name, workdir / "sources" / name, workdir / name)
    checkout.work.mkdir(parents=True, exist_ok=True)
    if not checkout.source.exists():
        temporary = checkout.source.with_suffix(".tmp")
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
            archive.extractall(temporary, filter="data")
        temporary.rename(checkout.source)
    code = "import automoe_jax, sys; sys.exit(not automoe_jax.__file__.startswith(sys.argv[1]))"
    checkout.python("-c", code, checkout.source)
    return checkout


class Record:
    """Finished parts in a file of JSON lines, so that a killed run resumes."""

    def __init__(self, path: Path):
        self._path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *lines, torn = text.split("\n")
        if torn:  # by a kill
            path.write_text(text.removesuffix(torn), encoding="utf-8")
        self._values = {entry["part"]: entry["value"] for entry in map(json.loads, lines)}

    def once(self, part: str, compute: Callable[[], Any]) -> Any:
        """The recorded value of a part; computes and appends it where there is none."""
        if part not in self._values:
            note(f"{part} ...")
            value = compute()
            with self._path.open("a", encoding="utf-8") as f:
                f.write(json.dumps({"part": part, "value": value}) + "\n")
            self._values[part] = value
        return self._values[part]


def in_turns(
    pair: Mapping[str, Item], call: Callable[[Item], Any], turn: int = 0
) -> dict[str, Any]:
    """`call` of both items of a pair; the one that is first in even turns is second in odd ones."""
    order = list(pair.items())[:: -1 if turn % 2 else 1]
    return {name: call(item) for name, item in order}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two checkouts and how to compare them.

    Attributes:
      pair: the checkouts by name, "before" and "after".
      record: finished parts.
      workdir: folder of the comparison.
      rounds: of each timed part; 0 for the part's own number.
      quickstart_flags: added to those of launch/pipeline.py.
    """

    pair: dict[str, Checkout]
    record: Record
    workdir: Path
    rounds: int
    quickstart_flags: tuple[str, ...]

    @property
    def config(self) -> str:
        """The flag of the earlier commit's quickstart: what both have to compute alike."""
        return f"--config={self.pair['before'].source / QUICKSTART}"

    def each(self, part: str, call: Callable[[Checkout], Any], turn: int = 0) -> dict[str, Any]:
        """What `call` returns for both checkouts, by name; once."""
        return self.record.once(part, lambda: in_turns(self.pair, call, turn))


# Figures, and goals by name.
Outcome = tuple[dict[str, Any], dict[str, dict[str, Any]]]


def difference_goals(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The goals of `differences.compare` results by name."""
    return {f"{name}, different": goal(figure["different"], 0) for name, figure in figures.items()}


def overrides(values: dict[str, Any]) -> list[str]:
    """Flags that set fields of a config."""
    return [f"--config.{name}={value}" for name, value in values.items()]
