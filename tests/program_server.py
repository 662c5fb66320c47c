"""Runs programs of `launch/` in forks of one process, which has imported what they import.

A program's imports take ten times as long as the mistake that it is to find. Each line of stdin is
a request, the arguments of `run`; each line of stdout is the exit code of its program, negative for
a signal.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import traceback
from typing import Any

import automoe_jax.phases


def serve():
    """Answers requests until stdin ends."""
    for module in pkgutil.iter_modules(automoe_jax.phases.__path__):
        importlib.import_module(f"automoe_jax.phases.{module.name}")
    gc.freeze()  # no fork copies the pages of what is there by collecting it
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(run(**json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(
    program: str,
    args: list[str],
    env: dict[str, str],
    timeout: float,
    stdin: str,
    stdout: str,
    stderr: str,
) -> int:
    """Runs a program in this process, with files for its streams, and returns its exit code.

    `env` is changes of environment variables; after `timeout` seconds the process is killed.
    """
    os.environ.update(env)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    files: list[tuple[str, int]] = [
        (stdin, os.O_RDONLY), (stdout, os.O_WRONLY), (stderr, os.O_WRONLY)
    ]  # fmt: skip
    for number, (path, mode) in enumerate(files):
        os.dup2(os.open(path, mode), number)
    code: Any = 0
    sys.argv = [f"launch/{program}.py", *args]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
