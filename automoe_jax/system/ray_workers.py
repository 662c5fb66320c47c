"""Parts of a job as tasks of a Ray cluster (docs/pods.md)."""

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from automoe_jax.system import checks
from automoe_jax.system.errors import UserError
from automoe_jax.system.parts import P, R

RETRIES = 3  # of a part whose node or process was lost
CONNECT_SECONDS = 5.0
WAIT_SECONDS = 10.0  # between looks at whether a node for the parts is left
_GB = 2**30


@dataclasses.dataclass(frozen=True)
class RayWorkers:
    """Tasks of a Ray cluster; see `parts.Workers`.

    Parts go to nodes with enough free cores and memory. Parts of a lost node run again elsewhere.

    Attributes:
      address: "auto" for the cluster that this machine is part of, or HOST:PORT of its head.
      cores: CPU cores of a part; JAX's and the kernels' thread pools have as many threads.
      memory_gb: memory that is set aside for a part, GiB.
    """

    address: str
    cores: int = 1
    memory_gb: float = 4.0

    remote = True

    def __post_init__(self):
        checks.at_least(1, self, "--ray_", "cores")
        if not self.memory_gb > 0:
            raise UserError(f"--ray_memory_gb is {self.memory_gb}; it must be above 0")

    def each(self, work: Callable[[P], R], parts: Iterable[P]) -> Iterator[tuple[int, R]]:
        """See `parts.Workers.each`.

        Raises:
          UserError: Ray is not installed, no such cluster, no node with enough cores and memory,
            a part that was lost more than `RETRIES` times, or a `UserError` of `work`.
        """
        ray = connect(self.address)
        self.slots()
        options = {"num_cpus": self.cores, "memory": int(self.memory_gb * _GB)}
        task = ray.remote(max_retries=RETRIES, **options)(_in_task)
        shared = ray.put(work)
        ahead = enumerate(parts)
        unfinished: dict[Any, int] = {}
        try:
            while True:
                # Twice as many as can run: each node has its next part. Not all, which need memory.
                room = max(2 * self.slots() - len(unfinished), 0)
                for i, part in itertools.islice(ahead, room):
                    unfinished[task.remote(shared, part, self.cores, os.getcwd())] = i
                if not unfinished:
                    return
                done, _ = ray.wait(list(unfinished), num_returns=1, timeout=WAIT_SECONDS)
                for reference in done:
                    yield unfinished.pop(reference), _result(ray, reference)
        finally:
            for reference in unfinished if ray.is_initialized() else ():
                ray.cancel(reference, force=True)

    def slots(self) -> int:
        """How many parts the nodes can run at a time; `UserError` as `each`."""
        ray = connect(self.address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        slots = 0
        for node in nodes:
            memory = node.get("memory", 0) // (self.memory_gb * _GB)
            slots += int(min(node.get("CPU", 0) // self.cores, memory))
        if not slots:
            cores, memory = (
                max((n.get(x, 0) for n in nodes), default=0) for x in ("CPU", "memory")
            )
            raise UserError(
                f"no node of the Ray cluster has {self.cores} cores and {self.memory_gb:g} GB for "
                f"a part (the largest: {cores:g} cores, {memory / _GB:.1f} GB); ask for less with "
                "--ray_cores and --ray_memory_gb, or add nodes; what is finished is kept"
            )
        return slots


def connect(address: str) -> Any:
    """The module `ray`, connected; again does nothing. `UserError` without Ray or the cluster."""
    try:
        import ray  # noqa: PLC0415
    except ImportError:
        raise UserError("--ray needs Ray: pip install 'automoe_jax[ray]'") from None
    if ray.is_initialized():
        return ray
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal()):
        raise UserError(f"--ray is {address!r}; give auto, or HOST:PORT of the cluster's head")
    try:
        if address != "auto":  # Ray itself tries for two minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        handler = signal.getsignal(signal.SIGTERM)  # Ray replaces it
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    except (OSError, OverflowError, ValueError, RuntimeError) as e:
        where = "on this machine" if address == "auto" else f"at {address}"
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"--ray={address}: no Ray cluster can be joined {where} ({reason}); make this machine "
            "a node of one: ray start --head, or ray start --address=HOST:PORT"
        ) from e
    return ray


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, UserError):
            raise e.cause from None
        if isinstance(e.cause, ray.exceptions.RaySystemError):  # the part could not be read there
            reason = next((x for x in str(e).splitlines() if "No module named" in x), str(e.cause))
            raise UserError(
                f"a node of the Ray cluster cannot run a part ({reason.strip()}); install the same "
                "version of automoe_jax on every node"
            ) from None
        raise
    except ray.exceptions.RayError as e:
        raise UserError(
            f"a part was lost {RETRIES + 1} times ({type(e).__name__}): its nodes stopped, or it "
            "needs more memory than --ray_memory_gb says; what is finished is kept, and the same "
            "command goes on"
        ) from None


def _in_task(work: Callable[[P], R], part: P, cores: int, folder: str) -> R:
    # Read when thread pools start, with the first use of JAX in this process.
    os.environ["NPROC"] = str(cores)
    if jax.config.values["jax_platforms"] != "cpu":  # no accelerator is set aside for a part
        jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(OSError):  # relative paths are those of the program that was started
        os.chdir(folder)
    return work(part)
