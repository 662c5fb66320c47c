"""glibc's malloc: huge pages for what it allocates, and memory given back to the system.

XLA's CPU backend allocates a step's working memory with malloc and frees it after every step. With
pages of 4 KB that costs a million page faults, about a second of a full-size step. With glibc's
tunable `glibc.malloc.hugetlb=1`, malloc asks for transparent huge pages (2 MB), where the kernel's
setting is `madvise` or `always`.

XLA frees its compiler's memory, but malloc keeps it for the process: over half a gigabyte after a
full-size step is compiled. Trimming returns it before the step runs.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb"
_KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_M_MMAP_THRESHOLD = -3  # of malloc.h
_MMAP_THRESHOLD = 1 << 20
_LONG_S = 0.1  # faster compilations leave too little memory to look for


def available() -> bool:
    """Whether glibc has the tunable (2.35) and the kernel allows transparent huge pages."""
    version = platform.libc_ver()[1].split(".")[:2]
    if not _is_glibc() or tuple(map(int, version)) < (2, 35):
        return False
    try:
        return "[never]" not in _KERNEL_SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def active() -> bool:
    """Whether this program runs with huge pages."""
    return f"{_HUGE_PAGES}=1" in os.environ.get(TUNABLES, "") and available()


def with_huge_pages(tunables: str) -> str | None:
    """`GLIBC_TUNABLES` with huge pages added; None if they are set already, or not supported."""
    if _HUGE_PAGES in tunables or not available():
        return None
    return ":".join(filter(None, [tunables, f"{_HUGE_PAGES}=1"]))


def without_huge_pages(environment: dict[str, str]) -> dict[str, str]:
    """An environment without the tunable, for a child process that is timed as users run it."""
    tunables = environment.get(TUNABLES, "")
    rest = ":".join(t for t in tunables.split(":") if t and not t.startswith(_HUGE_PAGES))
    others = {k: v for k, v in environment.items() if k != TUNABLES}
    return {**others, TUNABLES: rest} if rest else others


def trim():
    """Has malloc return its free memory to the system."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def trim_after_compiling():
    """From here on, trims after every long compilation of this process."""
    # Importing JAX takes 0.4 s, and a process that only times exports does not need it.
    import jax  # noqa: PLC0415

    if _is_glibc():
        jax.monitoring.register_event_duration_secs_listener(_trim_after)


def _trim_after(event: str, duration_secs: float, **kwargs: str | int):
    if event == COMPILE_EVENT and duration_secs > _LONG_S:
        trim()


def return_large_blocks():
    """From here on, malloc returns freed blocks of a megabyte and more to the system at once.

    By default glibc raises this threshold as blocks are freed, and keeps the memory that several
    threads have used: translating a few thousand sentences then holds over 100 MB too much.
    """
    if _is_glibc():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
