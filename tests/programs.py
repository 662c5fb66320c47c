"""Runs the programs of `launch/` as a user would."""

import os
import subprocess
import sys

from conftest import ROOT
from quick_compilation import FLAGS


def launch(
    program: str, *args: str, stdin: bytes | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS}
    return subprocess.run(
        [sys.executable, f"launch/{program}.py", *args],
        cwd=ROOT, input=stdin, capture_output=True, env=env, timeout=timeout, check=False,
    )  # fmt: skip


def mistake(program: str, *args: str, stdin: bytes | None = None) -> str:
    """The one line that a mistake is answered with."""
    result = launch(program, *args, stdin=stdin)
    error = result.stderr.decode().rstrip("\n")
    assert result.returncode == 2, error
    assert "Traceback" not in error
    lines = error.splitlines()
    assert lines[-1].startswith(f"{program}.py: ")
    assert len(lines) == 1, error
    return lines[-1]
