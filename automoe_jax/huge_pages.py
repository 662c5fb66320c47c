"""Large pages for the memory of a compiled step.

XLA's CPU backend takes a step's working memory from malloc and gives it back after every step.
In pages of 4 KB, a million page faults come with that: about a second of a full-size step. With
glibc's tunable `glibc.malloc.hugetlb=1`, malloc asks for transparent huge pages (2 MB), where the
kernel's setting is `madvise` or `always`.
"""

import os
import platform
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
_WANTED = "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def available() -> bool:
    """Whether this system has the tunable (glibc 2.35) and lets a program ask for such pages."""
    name, version = platform.libc_ver()
    if sys.platform != "linux" or name != "glibc":
        return False
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
    to anything is left alone.
    """
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
