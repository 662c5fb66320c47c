"""JAX's persistent compilation cache, with a folder for each kind of machine."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import threading
from pathlib import Path

import jax

from automoe_jax.system.malloc import COMPILE_EVENT

MIN_COMPILE_SECONDS = 0.1
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_RETRIEVAL_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"


def enable(folder: Path, *, environment: bool = True):
    """Keeps compiled programs in a sub-folder of `folder` for this kind of machine.

    A program compiled for one CPU may not run on another. `environment` sets it for children too.
    """
    path = folder / machine()
    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        if environment:
            os.environ[name.upper()] = str(value)


def enable_for_run(folder: Path):
    """As `enable`, in the folder that `JAX_COMPILATION_CACHE_DIR` names, else in one of a run."""
    given = os.environ.get(VARIABLE)
    # Set by `enable`, in the process that started this one, it names the sub-folder.
    enable(Path(given.removesuffix(machine())) if given else folder)


def folder() -> Path | None:
    """The folder of this process's compilation cache; None without one."""
    path = jax.config.values["jax_compilation_cache_dir"]
    return Path(path) if path else None


@functools.cache
def machine() -> str:
    """Hash of the CPU's model and features and of the version of jaxlib."""
    about = [platform.machine(), platform.processor(), importlib.metadata.version("jaxlib")]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    except OSError:
        pass
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]


class Compilations:
    """Counts this thread's compilations within a `with`, and how many of them a cache spared."""

    def __enter__(self) -> "Compilations":
        self.count = self.spared = 0
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exc):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int):
        if threading.get_ident() == self._thread:
            self.count += event == COMPILE_EVENT
            self.spared += event == _RETRIEVAL_EVENT
