"""What is asked of the C library's malloc: large pages, and to give back what compiling leaves.

XLA's CPU backend takes a step's working memory from malloc and gives it back after every step.
In pages of 4 KB, a million page faults come with that: about a second of a full-size step. With
glibc's tunable `glibc.malloc.hugetlb=1`, malloc asks for transparent huge pages (2 MB), where the
kernel's setting is `madvise` or `always`.

XLA frees what it needed to compile, but malloc keeps that memory for the process: over half a
gigabyte after a full-size step is compiled. It is trimmed before the step runs.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
_WANTED = "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COMPILED = "/jax/core/compile/backend_compile_duration"
_M_MMAP_THRESHOLD = -3  # of malloc.h
_LONG_S = 0.1  # what compiles faster leaves too little to look for


def available() -> bool:
    """Whether this system has the tunable (glibc 2.35) and lets a program ask for such pages."""
    if not _glibc():
        return False
    version = platform.libc_ver()[1]
    if tuple(int(n) for n in version.split(".")[:2]) < (2, 35):
        return False
    try:
        return "[never]" not in _SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def active() -> bool:
    """Whether this program runs with them."""
    return f"{_WANTED}=1" in os.environ.get(TUNABLES, "") and available()


def use():
    """Starts this program again with huge pages, unless it has them or cannot.

    The C library reads its tunables before a program begins. Whoever sets `glibc.malloc.hugetlb`
    to anything is left alone. From here on memory is trimmed after long compilations.
    """
    if _glibc():
        import jax  # noqa: PLC0415 what only times exports does without it

        jax.monitoring.register_event_duration_secs_listener(_trim)
    tunables = os.environ.get(TUNABLES, "")
    if _WANTED in tunables or not available():
        return
    os.environ[TUNABLES] = ":".join(filter(None, [tunables, f"{_WANTED}=1"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def without(environment: dict[str, str]) -> dict[str, str]:
    """An environment without the tunable, for a child process that is to run as users run it."""
    tunables = environment.get(TUNABLES, "")
    rest = ":".join(t for t in tunables.split(":") if t and not t.startswith(_WANTED))
    others = {k: v for k, v in environment.items() if k != TUNABLES}
    return {**others, TUNABLES: rest} if rest else others


def _glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def return_large_blocks():
    """From here on malloc gives blocks of a megabyte and more back as they are freed.

    Left alone, glibc raises that limit with what it sees freed, and keeps what several threads have
    used: translating a few thousand sentences then holds over 100 MB more than it needs.
    """
    if _glibc():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _trim(event: str, duration_secs: float, **kwargs: str | int):
    if event == COMPILED and duration_secs > _LONG_S:
        trim()


def trim():
    """Has malloc give back what it keeps for the process."""
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)
