"""Programs of a mapped function: one per batch shape, compiled by threads and kept in files.

A step of a small model compiles for as long as fifty steps run. So the first shape is compiled
first, and the others beside the steps of those that are there. With a compilation cache, programs
lie in its folder as machine code, under a hash of all they were made from, and a later run loads
them without tracing anything.
"""

import atexit
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Collection, Hashable
from typing import Any

import jax

from automoe_jax.system import program_files
from automoe_jax.system.program_files import Made

# Programs that are compiled at a time. XLA uses several cores for one; on two, a second program
# would only delay the one that is waited for.
MOST_THREADS = min(max((os.cpu_count() or 1) // 2, 1), 2)
_WAIT_SECONDS = 0.2  # between looks at whether to go on waiting


class Programs:
    """The compiled forms of a mapped function.

    Where several processes train, and for a function that cannot be compiled ahead, the function
    itself stands for its programs: all processes then compile in the same order.
    """

    def __init__(self, function: Any, about: str):
        """`about` says all that the function depends on, besides this package and its arguments."""
        self._function, self._about = function, about
        self._ahead = jax.process_count() == 1 and hasattr(function, "lower")
        self._jobs: dict[Hashable, _Job] = {}

    def schedule(self, shape: Hashable, arguments: tuple[Any, ...]):
        """Has the program of a shape compiled, after those scheduled before; once.

        `arguments` of the function are arrays or stand for them; their values are not read.
        """
        if self._ahead and shape not in self._jobs:
            abstract = jax.tree.map(_abstract, arguments)
            made_of = self._function, self._about, abstract, program_files.of_cache()
            self._jobs[shape] = _Job(functools.partial(program_files.make, *made_of))
            _pool.add(self._jobs[shape])

    def get(self, shape: Hashable, stop: Callable[[], object] = lambda: False) -> Any:
        """The program of a scheduled shape, waited for; None if `stop()` says so meanwhile."""
        if not self._ahead:
            return self._function
        job = self._jobs[shape]
        _pool.hurry(job)
        while not job.done.wait(_WAIT_SECONDS):
            if stop():
                return None
        if job.error is not None:
            raise job.error
        return job.program

    def state(self) -> tuple[int, int]:
        """(programs that are ready, programs that were scheduled)."""
        return sum(job.done.is_set() for job in self._jobs.values()), len(self._jobs)

    def cancel(self):
        """Gives up what is not being compiled yet."""
        _pool.remove(self._jobs.values())


def compiling() -> bool:
    """True while a thread compiles: the process cannot end in order before it is done."""
    return bool(_pool.threads)


def wait():
    """Waits until nothing is compiled beside the caller: what it times would be slower."""
    _pool.wait()


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


# --- threads -----------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Job:
    make: Callable[[], Made]
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    program: Any = None
    error: BaseException | None = None

    def run(self):
        try:
            self.program, keep = self.make()
        except BaseException as e:  # raised again where the program is wanted
            self.error = e
            return
        finally:
            self.done.set()
        keep()


class _Pool:
    """Runs jobs in daemon threads that end when there is nothing to do."""

    def __init__(self):
        self._lock = threading.Lock()
        self._waiting: list[_Job] = []
        self.threads: list[threading.Thread] = []  # those that may still compile

    def add(self, job: _Job):
        with self._lock:
            self._waiting.append(job)
            if len(self.threads) < MOST_THREADS:
                thread = threading.Thread(target=self._work, name="compile", daemon=True)
                self.threads.append(thread)
                thread.start()

    def hurry(self, job: _Job):
        """Makes a job the next one."""
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
                self._waiting.insert(0, job)

    def remove(self, jobs: Collection[_Job]):
        with self._lock:
            self._waiting = [job for job in self._waiting if job not in jobs]

    def wait(self):
        """Waits for all jobs, those that are added meanwhile included."""
        while threads := self._running():
            for thread in threads:
                thread.join()

    def _running(self) -> list[threading.Thread]:
        with self._lock:
            return list(self.threads)

    def finish(self):
        """Gives up what waits, and waits for what is being compiled."""
        with self._lock:
            self._waiting = []
        self.wait()

    def _work(self):
        while True:
            with self._lock:
                if not self._waiting:
                    self.threads.remove(threading.current_thread())
                    return
                job = self._waiting.pop(0)
            try:
                job.run()
            except BaseException:
                with self._lock:
                    self.threads.remove(threading.current_thread())
                raise


_pool = _Pool()
# Python must not end while XLA compiles: it would take the thread away under it.
atexit.register(_pool.finish)
