"""JAX's persistent compilation cache, with a folder for each kind of machine."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import jax

from automoe_jax.system.malloc import COMPILE_EVENT

MIN_COMPILE_SECONDS = 0.1


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


def enabled() -> bool:
    """True if this process has a compilation cache already."""
    return bool(jax.config.values["jax_compilation_cache_dir"])


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
    """Counts XLA's compilations within a `with`, those read from a cache included."""

    def __enter__(self) -> "Compilations":
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exc):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int):
        self.count += event == COMPILE_EVENT
