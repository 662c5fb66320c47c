"""Files of weights by name: .npz, .safetensors, and PyTorch's where PyTorch is installed.

Reading runs no code from a file: NumPy's object arrays are refused, and PyTorch's files are read
with `weights_only=True`.
"""

import argparse
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from automoe_jax.published.state_dict import State
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

_TORCH = (".pt", ".pth", ".bin")
SUFFIXES = (".npz", ".safetensors", *_TORCH)
_METERS = ("AverageMeter", "TimeMeter", "StopwatchMeter")
_DAMAGE = (OSError, MemoryError, EOFError, KeyError, TypeError, ValueError, RuntimeError,
           zipfile.BadZipFile, zlib.error, SafetensorError)  # fmt: skip


class _Meter:
    """Stands for a fairseq meter."""


def read(path: str | Path) -> State:
    """The arrays of a state dict, or of a fairseq checkpoint that has one, by name.

    Raises `UserError` if the file is missing, damaged, of another kind, or could run code.
    """
    path = files.expanded(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; give a file")
    if path.suffix not in SUFFIXES:
        raise UserError(f"checkpoint {path} must end in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".npz":
            return _read_npz(path)
        return load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except UserError:
        raise
    except _DAMAGE as e:
        raise _damaged(path, e) from None


def write(path: str | Path, state: State):
    """Writes .npz or .safetensors; `UserError` if the name has another ending or is taken."""
    path = files.expanded(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"checkpoint {path} must end in .npz or .safetensors to be written")
    if path.exists():
        raise UserError(f"{path} exists; name a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.suffix == ".npz":
        with temporary.open("wb") as f:
            np.savez(f, **state)  # pyright: ignore[reportArgumentType]
    else:
        save_file({key: np.ascontiguousarray(x) for key, x in state.items()}, temporary)
    temporary.replace(path)


def _damaged(path: Path, reason: object) -> UserError:
    text = " ".join(str(reason).split()) or type(reason).__name__
    return UserError(f"checkpoint {path} is damaged or not a {path.suffix} file: {text[:200]}")


def _pickled(path: Path, what: str) -> UserError:
    return UserError(
        f"checkpoint {path} holds {what}, and reading it could run code; save its weights alone, "
        "as .safetensors, .npz, or torch.save of the state dict"
    )


def _read_npz(path: Path) -> State:
    # NumPy takes any file that does not begin as a zip archive for a pickle.
    with path.open("rb") as f:
        if f.read(2) != b"PK":
            raise _damaged(path, "it is no zip archive")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except ValueError as e:
        if "pickle" in str(e).lower():
            raise _pickled(path, "pickled Python objects") from None
        raise
    for key, array in found.items():
        if not isinstance(array, np.ndarray):
            raise UserError(f"checkpoint {path}: {key} is no array")
    return found


def _read_torch(path: Path) -> State:
    try:
        import torch  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"reading {path} needs PyTorch, which is not installed: pip install torch, or save the "
            "state dict as .safetensors or .npz where it is"
        ) from None
    # fairseq stores its options and meters beside the weights, as records of names and values.
    # An empty class of ours stands for its meters.
    meters = [(_Meter, f"fairseq.meters.{name}") for name in _METERS]
    harmless = torch.serialization.safe_globals([argparse.Namespace, *meters])
    try:
        with harmless:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        named = re.search(r"GLOBAL ([\w.]+)", str(e))
        if named is None and "pickle" not in str(e).lower():
            raise _damaged(path, e) from None
        raise _pickled(path, f"{named.group(1)} objects" if named else "Python objects") from None
    return _state_of(found, path, torch)


def _state_of(found: Any, path: Path, torch: Any) -> State:
    """The state dict of a loaded file, as NumPy arrays."""
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]
    if not isinstance(found, dict) or not all(torch.is_tensor(x) for x in found.values()):
        raise UserError(
            f'checkpoint {path} is not a state dict, nor a fairseq checkpoint with one as "model"'
        )
    try:
        plain = {k: x.float() if x.is_floating_point() else x for k, x in found.items()}
        return {str(key): x.detach().numpy() for key, x in plain.items()}
    except (TypeError, RuntimeError, NotImplementedError) as e:
        raise UserError(f"checkpoint {path} has tensors that are no plain arrays: {e}") from None
