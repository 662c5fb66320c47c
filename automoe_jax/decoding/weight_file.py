"""Weights in a safetensors file that is mapped into memory.

The safetensors library does not align tensors, and its reader copies them. Here the header is
padded and arrays of a multiple of 64 bytes come first, so that XLA uses them without a copy.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.system.errors import UserError

ALIGNMENT = 64
_NAMES = {"F32": np.float32, "I8": np.int8, "I32": np.int32}
_DTYPES = {np.dtype(dtype): name for name, dtype in _NAMES.items()}
_PREFIX = 8  # bytes of the header's length


def save(path: Path, weights: dict[str, np.ndarray]):
    """Writes float32, int8 and int32 arrays."""
    order = sorted(weights, key=lambda name: (weights[name].nbytes % ALIGNMENT > 0, name))
    header: dict[str, Any] = {}
    at = 0
    for name in order:
        array = weights[name]
        span = [at, at + array.nbytes]
        header[name] = {"dtype": _DTYPES[array.dtype], "shape": array.shape, "data_offsets": span}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX + len(text)) % ALIGNMENT)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(_PREFIX, "little") + text)
        for name in order:
            f.write(np.ascontiguousarray(weights[name]).data)


def load(path: Path) -> dict[str, np.ndarray]:
    """Read-only arrays in the mapped file; `UserError` where it is damaged.

    The file must not be overwritten while they are in use; replacing it by another file is safe.
    """
    try:
        mapped = np.memmap(path, np.uint8, "r")
        start = _PREFIX + int.from_bytes(mapped[:_PREFIX].tobytes(), "little")
        header = json.loads(mapped[_PREFIX:start].tobytes())
        header.pop("__metadata__", None)
        return {name: _view(mapped[start:], **entry) for name, entry in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError, MemoryError) as e:  # fmt: skip
        reason = str(e) or type(e).__name__
        raise UserError(
            f"weights {path} cannot be read: {reason}; copy the export again, or make it again"
        ) from None


def _view(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    start, end = data_offsets
    # A plain array: slices of a memmap are memmaps too.
    return np.asarray(data[start:end]).view(_NAMES[dtype]).reshape(shape)
