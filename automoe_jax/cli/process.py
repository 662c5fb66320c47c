"""Prepares the process of a command, runs the command, and turns mistakes into one line.

Everything that must happen before JAX starts happens here: environment variables, and huge pages
for the commands that train. The library changes neither by being imported.
"""

import errno
import gc
import importlib
import importlib.util
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from automoe_jax.cli import options, terminal
from automoe_jax.system import interrupt, malloc
from automoe_jax.system.errors import UserError

# Commands whose steps allocate hundreds of megabytes, and compile programs as large.
_COMPILING = {"train", "pipeline", "search", "rank", "fit_latency"}
# Commands that go on, given again, from where they stopped.
_RESUMABLE = {
    "pipeline", "prepare", "train", "fit_latency", "search", "rank", "sensitivity", "halving",
    "distill",
}  # fmt: skip
# New objects before Python collects garbage. Tracing makes millions that live on; with the default,
# collecting among them takes a quarter of the time.
_GC_THRESHOLDS = (200_000, 50, 50)
# Of Google, whose TPUs are; /sys holds one such folder for each PCI device of a Linux machine.
_PCI_VENDOR = "0x1ae0"
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_FULL_DISK = (
    "the disk is full; what was finished before is good: free some space, and the same command "
    "goes on"
)


def run(command: str):
    """Runs a command with the flags of `sys.argv`; a user's mistake is one line and exit code 2."""
    try:
        prepare(compiling=command in _COMPILING)
        interrupt.install()
        # Orbax logs tracebacks and warnings for programmers; what it raises comes here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # Without a cache, for want of space or rights, JAX compiles again.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
        module = importlib.import_module(f"automoe_jax.cli.{command}")
        if {"--help", "-h", "-help"} & set(sys.argv[1:]):
            print(options.help_text(module))
            return
        options.parse(options.with_shipped(sys.argv), module)
        try:
            module.main()
        except BaseException:
            try:
                _close(module)
            except UserError as e:  # what happened first decides how the process ends
                terminal.note(str(e))
            raise
        _close(module)
    except UserError as e:
        _fail(str(e))
    except BrokenPipeError:
        leave_closed_pipe()
    except Exception as e:
        if _disk_is_full(e):
            _fail(_FULL_DISK if command in _RESUMABLE else "the disk is full; free some space")
        if isinstance(e, OSError) and e.filename is not None:
            _fail(f"{e.filename}: {e.strerror}")
        where = traceback.extract_tb(e.__traceback__)[-1].filename
        asked = os.environ.get("JAX_PLATFORMS")
        if asked and where.endswith("xla_bridge.py"):
            reason = str(e) or "no such device here"
            _fail(f"JAX cannot start with JAX_PLATFORMS={asked!r}: {reason}")
        raise
    except KeyboardInterrupt as e:
        goes_on = "; the same command goes on from where this one stopped"
        terminal.note(f"interrupted{goes_on if command in _RESUMABLE else ''}")
        _exit(e.exit_code if isinstance(e, interrupt.Interrupted) else 130)


def _close(command: ModuleType):
    """Ends what a command has begun, as sending a run to its bucket."""
    if hasattr(command, "CONFIG"):
        command.CONFIG.close()


def leave_closed_pipe() -> NoReturn:
    """Ends the process whose output's reader has closed it."""
    # Python would complain when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _disk_is_full(error: BaseException) -> bool:
    """True if that is the error or its cause; libraries put it in words of their own."""
    found: BaseException | None = error
    while found is not None:
        if getattr(found, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(found):
            return True
        found = found.__cause__ or found.__context__
    return False


def prepare(*, compiling: bool):
    """Sets what must be set before JAX starts.

    A process that compiles long programs is started again with glibc's tunable for huge pages,
    which glibc reads before `main`, and trims its memory after long compilations; it collects
    garbage rarely. A tunable that is set already stays. Where libtpu has no TPU, JAX looks for
    none.
    """
    xla = os.environ.get("XLA_FLAGS", "")
    limit = "xla_cpu_collective_call_terminate_timeout_seconds"
    if "force_host_platform_device_count" in xla and limit not in xla:
        # Simulated devices may lag behind each other for minutes while one of them compiles.
        os.environ["XLA_FLAGS"] = f"{xla} --{limit}=600"
    if not {"JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"} & os.environ.keys() and _has_libtpu_alone():
        os.environ["JAX_PLATFORMS"] = "cpu"
        if jax := sys.modules.get("jax"):  # which has read its environment
            jax.config.update("jax_platforms", "cpu")
    if not compiling:
        return
    gc.set_threshold(*_GC_THRESHOLDS)
    tunables = malloc.with_huge_pages(os.environ.get(malloc.TUNABLES, ""))
    if tunables is not None:
        os.environ[malloc.TUNABLES] = tunables
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    malloc.trim_after_compiling()


def _has_libtpu_alone() -> bool:
    """True if libtpu is installed, as for `train --topology`, but no TPU and no plugin for GPUs.

    JAX would ask libtpu for TPUs, which takes 2 s and writes seven lines of warnings.
    """
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_plugins"):
        return False
    vendors = (path.read_text().strip() for path in _PCI_DEVICES.glob("*/vendor"))
    return _PCI_VENDOR not in vendors


def _fail(text: str) -> NoReturn:
    """Prints one line on stderr and exits with 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(text.split())}", file=sys.stderr)
    _exit(2)


def _exit(code: int) -> NoReturn:
    """Ends the process, at once if a thread compiles: XLA cannot be stopped, only left."""
    programs = sys.modules.get("automoe_jax.system.programs")
    if programs is not None and programs.compiling():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
