"""Starting a program again with huge pages, once, and leaving the user's own setting alone."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from automoe_jax.system import malloc

PROGRAM = """
import os, sys
from automoe_jax.cli import process
print("begun")
process.prepare(compiling=True)
print(os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:])
"""


FREED = """
import ctypes, os
import jax
from automoe_jax.cli import process
from automoe_jax.system import malloc

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def resident_mb():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

# Below the size that malloc maps by itself; one block at the end keeps the heap from shrinking.
blocks = [libc.malloc(100_000) for _ in range(2001)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
    libc.free(block)
process.prepare(compiling=True)
for seconds in (0.01, 2.0):
    before = resident_mb()
    jax.monitoring.record_event_duration_secs(malloc.COMPILE_EVENT, seconds)
    print(before - resident_mb() > 150)
"""


def begin(path, tunables, program=PROGRAM):
    path.write_text(program)
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    if tunables:
        environment[malloc.TUNABLES] = tunables
    return subprocess.run(
        [sys.executable, str(path), "--a=1", "two words"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip


@pytest.mark.skipif(not malloc.available(), reason="no glibc 2.35 or no huge pages here")
def test_begins_again_once_with_the_same_arguments(tmp_path):
    lines = begin(tmp_path / "x.py", "glibc.malloc.arena_max=3")
    wanted = "glibc.malloc.arena_max=3:glibc.malloc.hugetlb=1 ['--a=1', 'two words']"
    assert lines == ["begun", "begun", wanted]


def test_own_setting_stays(tmp_path):
    lines = begin(tmp_path / "x.py", "glibc.malloc.hugetlb=0")
    assert lines == ["begun", "glibc.malloc.hugetlb=0 ['--a=1', 'two words']"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_is_given_back_after_a_long_compilation(tmp_path):
    assert begin(tmp_path / "x.py", "glibc.malloc.hugetlb=0", FREED) == ["False", "True"]


def test_a_child_runs_as_its_user_would():
    huge, other = "glibc.malloc.hugetlb=1", "glibc.malloc.arena_max=3"
    mixed = {"A": "b", malloc.TUNABLES: f"{huge}:{other}"}
    assert malloc.without_huge_pages(mixed) == {"A": "b", malloc.TUNABLES: other}
    assert malloc.without_huge_pages({malloc.TUNABLES: huge}) == {}
