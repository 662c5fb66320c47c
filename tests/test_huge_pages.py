"""Starting a program again with huge pages, once, and leaving the user's own setting alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from automoe_jax import huge_pages

PROGRAM = """
import os, sys
from automoe_jax import huge_pages
print("begun")
huge_pages.use()
print(os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:])
"""


def begin(path, tunables):
    path.write_text(PROGRAM)
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(Path(__file__).parents[1])}
    if tunables:
        environment[huge_pages.TUNABLES] = tunables
    return subprocess.run(
        [sys.executable, str(path), "--a=1", "two words"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip


@pytest.mark.skipif(not huge_pages.available(), reason="no glibc 2.35 or no huge pages here")
def test_begins_again_once_with_the_same_arguments(tmp_path):
    lines = begin(tmp_path / "x.py", "glibc.malloc.arena_max=3")
    wanted = "glibc.malloc.arena_max=3:glibc.malloc.hugetlb=1 ['--a=1', 'two words']"
    assert lines == ["begun", "begun", wanted]


def test_own_setting_stays(tmp_path):
    lines = begin(tmp_path / "x.py", "glibc.malloc.hugetlb=0")
    assert lines == ["begun", "glibc.malloc.hugetlb=0 ['--a=1', 'two words']"]


def test_a_child_runs_as_its_user_would():
    mixed = {"A": "b", huge_pages.TUNABLES: "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=3"}
    assert huge_pages.without(mixed) == {"A": "b", huge_pages.TUNABLES: "glibc.malloc.arena_max=3"}
    assert huge_pages.without({huge_pages.TUNABLES: "glibc.malloc.hugetlb=1"}) == {}
