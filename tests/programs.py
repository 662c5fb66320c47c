"""Runs the programs of `launch/` as a user would."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT
from quick_compilation import FLAGS

from automoe_jax.system import malloc


def launch(
    program: str,
    *args: str,
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """A program's exit code and output, killed after `timeout` seconds.

    It runs in a process of its own, which does not wait for imports (`program_server.py`), with the
    tests' environment variables and those of `env`.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in ("stdin", "stdout", "stderr")}
        for path in paths.values():
            Path(path).touch()
        Path(paths["stdin"]).write_bytes(stdin)
        request = {"program": program, "args": args, "env": env or {}, "timeout": timeout, **paths}
        server = program_server(json.dumps(environment(), sort_keys=True))
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        stdout, stderr = (Path(paths[name]).read_bytes() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([program, *args], code, stdout, stderr)


def environment() -> dict[str, str]:
    """The environment variables of the programs."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS}
    env.pop("PYTEST_CURRENT_TEST", None)
    # Those that a program starts itself again with.
    tunables = malloc.with_huge_pages(env.get(malloc.TUNABLES, ""))
    return {**env, malloc.TUNABLES: tunables} if tunables else env


@functools.cache
def program_server(environment: str) -> subprocess.Popen:
    """A server of programs with some environment variables; it ends with the tests."""
    return subprocess.Popen(
        [sys.executable, "tests/program_server.py"],
        cwd=ROOT, env=json.loads(environment), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def mistake(program: str, *args: str, stdin: bytes = b"") -> str:
    """The one line that a mistake is answered with."""
    result = launch(program, *args, stdin=stdin)
    error = result.stderr.decode().rstrip("\n")
    assert result.returncode == 2, error
    assert "Traceback" not in error
    lines = error.splitlines()
    assert lines[-1].startswith(f"{program}.py: ")
    assert len(lines) == 1, error
    return lines[-1]
