"""`--config` and `--workdir` of a command that works on a run."""

import contextlib
from pathlib import Path

import jax
from absl import flags

from automoe_jax.cli import terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.cli.terminal import TerminalProgress
from automoe_jax.config import RunConfig
from automoe_jax.phases.run import CACHE, Run, open_run
from automoe_jax.system import compile_cache, locks, workdir
from automoe_jax.system.bucket import Bucket, folder_of, is_url
from automoe_jax.system.errors import UserError
from automoe_jax.system.parts import HERE, Workers
from automoe_jax.system.ray_workers import RayWorkers

# `--help` lists a flag under the command that calls `RunFlags`, not under this module.
flags.disclaim_key_flags()


class RunFlags(ConfigFlag):
    """`--config` and `--workdir` of one command, defined when this is constructed.

    With `parts`, `--ray` and what a part needs too: memory `memory_gb`, by default.
    """

    def __init__(self, *, parts: bool = False, memory_gb: float = 4.0):
        super().__init__()
        about = "folder or URL (gs://, s3://) of the run (default: runs/<config>)"
        self._at_end, self._fetched = contextlib.ExitStack(), False
        self._workdir = flags.DEFINE_string("workdir", None, about)
        self._ray = _define_ray(memory_gb) if parts else None

    @property
    def given_path(self) -> str:
        """The workdir as the command line names it; runs/<name of the config file> by default."""
        given = self._workdir.value
        return f"runs/{self.stem}" if given is None else given

    @property
    def path(self) -> Path:
        """The absolute path of the workdir."""
        return workdir.resolve(self._bucket.copy if self._bucket else self.given_path)

    @property
    def _bucket(self) -> Bucket | None:
        given = self.given_path
        return Bucket.of(given, jax.process_index()) if is_url(given) else None

    def fetch(self):
        """Fetches a run that is in a bucket, locks its copy, and sends what changes until `close`.

        Nothing for a folder, or the second time.
        """
        bucket = self._bucket
        if bucket is None or self._fetched:
            return
        self._fetched, first = True, jax.process_index() == 0
        locks.hold(bucket.copy)
        bucket.pull(exact=not first)
        if first:
            self._at_end.enter_context(bucket.kept(terminal.note))

    def require(self, otherwise: str = ""):
        """`UserError` if the workdir is not a run: of a name mistyped, a new one would be made.

        `otherwise` says what works without one.
        """
        self.fetch()
        if not (self.path / workdir.MANIFEST).exists():
            raise UserError(
                f"--workdir {self.path} is not a run; train one with launch/train.py, or convert "
                f"one with launch/convert.py{otherwise}"
            )

    def run(self, config: RunConfig) -> Run:
        """The run, whether it exists or not."""
        self.fetch()
        return Run(config, self.path, TerminalProgress())

    def open_run(self, config: RunConfig) -> Run:
        """Starts or continues the run; keeps programs that this process compiles in its folder."""
        workers, bucket = self._workers(), self._bucket
        if workers.remote and bucket is not None:
            raise UserError(
                f"--workdir={bucket.url} and --ray do not go together: the nodes do not see this "
                "machine's copy of the bucket; use a folder that all of them see"
            )
        self.fetch()
        run = open_run(config, self.path, TerminalProgress(), workers, bucket)
        compile_cache.enable_for_run(run.path / CACHE)
        return run

    def close(self):
        """Sends what is new in a run to its bucket."""
        self._at_end.close()

    def _workers(self) -> Workers:
        if self._ray is None:
            return HERE
        address, cores, memory_gb = (flag.value for flag in self._ray)
        if not address:
            return HERE
        return RayWorkers(address, cores, memory_gb)


def _define_ray(memory_gb: float) -> tuple[flags.FlagHolder, ...]:
    about = "do independent parts on a Ray cluster: auto, or HOST:PORT of its head"
    return (
        flags.DEFINE_string("ray", "", about),
        flags.DEFINE_integer("ray_cores", RayWorkers.cores, "with --ray, CPU cores of a part"),
        flags.DEFINE_float("ray_memory_gb", memory_gb, "with --ray, memory of a part, GiB"),
    )


def named_folder(flag: flags.FlagHolder[str | None]) -> Path | None:
    """The folder that a flag names, absolute, of a URL its copy here; None where none is given."""
    return folder_of(flag.value).absolute() if flag.value else None
