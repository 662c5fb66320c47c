"""What every program shares: flags, one-line errors, progress on the terminal."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from automoe_jax.system.errors import UserError

# Notes and bars go to stderr: stdout is for results.
_console = Console(stderr=True, highlight=False)
# Seconds between the lines that stand for a bar where there is no terminal.
_EVERY = 10.0


def run(command: str):
    """Runs a command of `automoe_jax.cli`; a user's mistake is one line and exit code 2."""
    try:
        module = importlib.import_module(f"automoe_jax.cli.{command}")
        if {"--help", "-h", "-help"} & set(sys.argv[1:]):
            print(_help(module))
            return
        rest = _parse(sys.argv)
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; options start with --")
        module.main()
    except UserError as e:
        fail(str(e))
    except BrokenPipeError:
        # Whoever read our output has had enough; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.filename is None:
            raise
        fail(f"{e.filename}: {e.strerror}")
    except KeyboardInterrupt:
        _console.print(
            "interrupted; the same command goes on from the last checkpoint", markup=False
        )
        sys.exit(130)


def fail(text: str):
    """Prints one line and exits with 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)


def _help(module: ModuleType) -> str:
    """What the program does, its options, and the fields that `--config.` takes."""
    about = module.__doc__ or ""
    options = flags.FLAGS.module_help(module).replace("\n\n", "\n")
    parts = [about.strip(), "Options:" + options.split(":", 1)[1]]
    if "config" in flags.FLAGS:
        lines = [f"  --config.{name}={value}" for name, value in _fields().items()]
        parts.append("Fields of --config and their defaults:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _parse(argv: list[str]) -> list[str]:
    for name, value in zip(argv[1:], [*argv[2:], ""], strict=False):
        given = value if name == "--config" else name.removeprefix("--config=")
        if name.startswith("--config") and given.endswith((".yml", ".yaml")) and ":" not in given:
            raise UserError(f"{given} is YAML; use --config=configs/supertransformer.py:{given}")
    try:
        return flags.FLAGS(argv)[1:]
    except flags.Error as e:
        text = str(e).removeprefix("FATAL Flags parsing error:").strip()
        if "Traceback" in text:  # of a config file: what it ended with is what is wrong
            raise UserError(_of_config(text)) from None
        raise UserError(f"{text} (--help lists the options)") from None
    except Exception as e:  # a config is a program, and a field that is not there any error
        raise UserError(_unknown_field(argv, e)) from None


def _of_config(traceback: str) -> str:
    """The line for a config file that failed."""
    reason = traceback.splitlines()[-1].partition(": ")[2]
    if "takes 0 positional arguments" in reason:
        reason = "this file takes nothing behind a colon"
    return f"--config cannot be read: {reason}"


def _unknown_field(argv: list[str], error: Exception) -> str:
    """The line for a misspelt `--config.` field: which, and what there is."""
    import difflib  # noqa: PLC0415

    known = _fields()
    for argument in argv[1:]:
        if argument.startswith("--config."):
            name = argument.removeprefix("--config.").split("=")[0]
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"; did you mean --config.{near[0]}?" if near else ""
                return f"--config.{name} is not a field of the config{hint}"
    return f"--config cannot be read: {type(error).__name__}: {error}"


def _fields() -> dict[str, Any]:
    """Default by name of every field of a config, as "training.steps"."""
    from automoe_jax.config import base  # noqa: PLC0415

    def flat(group: Any, prefix: str) -> dict[str, Any]:
        fields = {}
        for name, value in group.items():
            nested = hasattr(value, "items")
            fields |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
        return fields

    return flat(base(), "")


def load_config(holder) -> Any:
    """The `RunConfig` of a `--config` flag."""
    from automoe_jax.config import resolve  # noqa: PLC0415

    try:
        value = holder.value
        list(value or ())  # a file that could not be loaded says so at its first use
    except Exception as e:  # a config is a program: it can fail in any way
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        raise UserError(f"--config cannot be read: {lines[-1] if lines else e}") from None
    if value is None:
        raise UserError("--config is missing; give a file, as --config configs/quickstart.py")
    return resolve(value)


def default_workdir() -> str:
    """runs/<name of the config file>."""
    holder: Any = flags.FLAGS["config"]
    return f"runs/{Path(holder.config_filename).stem}"


def print_json(value: Any):
    """One JSON line on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def set_jax_defaults():
    """Before JAX starts: simulated devices may lag behind each other for long."""
    xla = os.environ.get("XLA_FLAGS", "")
    limit = "xla_cpu_collective_call_terminate_timeout_seconds"
    if "force_host_platform_device_count" in xla and limit not in xla:
        os.environ["XLA_FLAGS"] = f"{xla} --{limit}=600"


class TerminalProgress:
    """Bars on a terminal; elsewhere a line every few seconds."""

    def note(self, text: str):
        _console.print(text, markup=False, soft_wrap=True)

    def task(self, name: str, total: int):
        return _Bar(name, total) if _console.is_terminal else _Lines(name, total)


class _Bar:
    def __init__(self, name: str, total: int):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=_console,
            transient=True,
        )
        self._values: dict[str, object] = {}
        self._id = self._progress.add_task(name, total=total, values="")
        self._progress.start()

    def update(self, done: int, **fields: object):
        self._values.update(fields)
        self._progress.update(self._id, completed=done, values=_shown(self._values))

    def close(self):
        self._progress.stop()


class _Lines:
    def __init__(self, name: str, total: int):
        self._name, self._total = name, total
        self._start = self._last = time.monotonic()
        self._first: int | None = None
        self._values: dict[str, object] = {}

    def update(self, done: int, **fields: object):
        self._values.update(fields)
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._last < _EVERY:
            return
        self._last = now
        left = ""
        if done > self._first:
            seconds = (now - self._start) * (self._total - done) / (done - self._first)
            left = f", {seconds:,.0f} s left"
        _console.print(
            f"{self._name}: {done:,} of {self._total:,}{left} {_shown(self._values)}".rstrip(),
            markup=False,
            soft_wrap=True,
        )

    def close(self):
        pass


def _shown(values: dict[str, object]) -> str:
    return " ".join(f"{k}={v}" for k, v in values.items())
