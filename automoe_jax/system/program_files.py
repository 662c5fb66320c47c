"""Compiled programs in files: machine code under a hash of all it was made from.

JAX's own compilation cache needs a program's trace to look for it; these files do not. A file is
run as it is, so its folder must be the user's own.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from automoe_jax.system import compile_cache, files, user_cache
from automoe_jax.system.compile_cache import Compilations

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokamax")
_DIGEST_BYTES = hashlib.sha256().digest_size


class Made(NamedTuple):
    """A compiled program, and what writes it to its file, if it is not there yet."""

    program: Any
    keep: Callable[[], None] = lambda: None


def make(
    function: Any,
    about: str,
    arguments: tuple[Any, ...],
    folder: Path | None,
    devices: Sequence[Any] | None = None,
) -> Made:
    """The program of a jitted or mapped function, from its file in `folder` or compiled.

    Args:
      about: all that the function depends on, besides this package and its arguments.
      arguments: arrays, or what stands for them; their values are not read.
      folder: None for no files.
      devices: what a program from a file runs on; None for all.
    """
    path = folder and folder / _key(about, arguments)
    program = path and _read(path, devices)
    if program is not None:
        return Made(program)
    with Compilations() as compilations:
        program = function.lower(*arguments).compile()
    # XLA writes one that came from JAX's cache without some of its code.
    if path is None or compilations.spared:
        return Made(program)
    return Made(program, functools.partial(_write, path, program))


def of_cache() -> Path | None:
    """The folder of programs in this process's compilation cache; None without one of the user."""
    folder = compile_cache.folder()
    with contextlib.suppress(OSError):
        return folder and user_cache.private(folder / "programs")
    return None


def _key(about: str, arguments: tuple[Any, ...]) -> str:
    """Hash of all that a program depends on."""
    leaves, treedef = jax.tree.flatten(arguments)
    settings = sorted((k, v) for k, v in jax.config.values.items() if "cache" not in k)
    devices = [(d.platform, d.device_kind, d.id) for d in jax.local_devices()]
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    shapes = [(x.shape, x.dtype) for x in map(jax.typeof, leaves)]
    parts = [about, shapes, treedef, settings, devices, flags]
    text = "\n".join([*map(repr, parts), _code(), compile_cache.machine()])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """Hash of this package's sources and of the versions of those it compiles with."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    for name in _PACKAGES:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()


def _read(path: Path, devices: Sequence[Any] | None) -> Any:
    """The program in a file; None if there is none that can be used."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            return None
        payload, in_tree, out_tree = pickle.loads(zlib.decompress(data[_DIGEST_BYTES:]))
        backend = devices[0].client if devices else None
        return serialize_executable.deserialize_and_load(
            payload, in_tree, out_tree, backend, devices
        )
    except Exception:  # of another make, or on a platform that cannot: it is compiled instead
        return None


def _write(path: Path, program: Any):
    try:
        content = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), 1)
        files.write_bytes(path, hashlib.sha256(content).digest() + content)
    except Exception:  # a platform that cannot, or no space: the next run compiles again
        return
