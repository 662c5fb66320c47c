"""Locks of folders: one process at a time, and none when it has ended."""

import os
import signal
import subprocess
import sys

import pytest

from automoe_jax.system import locks
from automoe_jax.system.errors import UserError

HOLD = """
import sys, time, pathlib
from automoe_jax.system import locks
locks.hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_has_ended(holder, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=rf"is in use by process {holder.pid} on .* \(-c "):
            locks.hold(tmp_path)
    assert holder.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    locks.hold(tmp_path)
    locks.hold(tmp_path)  # again, by the same process


def test_a_lock_moves_with_its_folder(tmp_path):
    locks.hold(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    locks.hold(tmp_path / "b")
    locks.hold(tmp_path / "a")  # another folder


def test_a_lock_that_says_nothing(holder, tmp_path):
    (tmp_path / locks.LOCK).write_text("")
    with pytest.raises(UserError, match="is in use by another process; wait"):
        locks.hold(tmp_path)
