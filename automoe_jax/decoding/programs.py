"""The programs of a loaded export: each is read once, and compiled once for each shape."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from automoe_jax.decoding.batching import Batch
from automoe_jax.system.errors import UserError

# Beam size and kernels.
PROGRAM = "program_beam{}_{}.jaxexport"
# Taking a program from the compilation cache is faster than this.
SLOW_COMPILE_S = 0.4


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of an export for one kind of kernels; other fields as in `Translator.load`."""

    folder: Path
    kernels: str
    weights: dict[str, Any]  # on `device`, in the layout of the kernels
    device: Any  # jax.Device
    on_compile: Callable[[str], None]
    release_memory: Callable[[], None]
    _programs: dict[int, Any] = dataclasses.field(default_factory=dict)
    _compiled: dict[tuple[int, ...], Callable] = dataclasses.field(default_factory=dict)
    _compiling: Any = dataclasses.field(default_factory=threading.Lock)

    def program(self, beam_size: int) -> Any:
        """The exported program of a beam size, under `jax.jit`."""
        if beam_size not in self._programs:
            path = self.folder / PROGRAM.format(beam_size, self.kernels)
            try:
                exported = jax_export.deserialize(bytearray(path.read_bytes()))
            except Exception as e:  # jax.export raises many kinds of errors on a damaged file
                reason = str(e) or type(e).__name__
                raise UserError(f"program {path} cannot be read: {reason}") from None
            given = [(x.shape, x.dtype) for x in jax.tree.leaves(self.weights)]
            if given != [(x.shape, x.dtype) for x in exported.in_avals[: len(given)]]:
                raise UserError(f"program {path} is of other weights; load the export again")
            self._programs[beam_size] = jax.jit(exported.call)
        return self._programs[beam_size]

    def is_compiled(self, batch: Batch, beam_size: int) -> bool:
        return (beam_size, *batch.source_BS.shape, batch.time) in self._compiled

    def run(
        self,
        source_BS: np.ndarray,
        beam_size: int,
        time: int,
        min_length: int,
        max_length: int,
        length_penalty: float,
    ) -> dict[str, jax.Array]:
        """Runs the program; see `export.program`. Several threads may call it at a time."""
        numbers = np.int32(min_length), np.int32(max_length), np.float32(length_penalty)
        time_T = np.arange(time, dtype=np.int32)
        arguments = jax.device_put((source_BS, time_T, *numbers), self.device)
        shape = (beam_size, *source_BS.shape, time)
        if shape not in self._compiled:
            with self._compiling:  # one shape at a time, and each once
                if shape not in self._compiled:
                    self._compiled[shape] = self._compile(beam_size, arguments)
        return self._compiled[shape](self.weights, *arguments)

    def _compile(self, beam_size: int, arguments: tuple[jax.Array, ...]) -> Callable:
        """The program for arguments of these shapes, made or taken from the compilation cache."""
        rows, length = arguments[0].shape
        what = f"{rows} sentence(s) of up to {length} tokens, beam {beam_size}"
        program = self.program(beam_size)
        note = threading.Timer(SLOW_COMPILE_S, lambda: self.on_compile(what))
        note.start()
        # Compiling takes more memory than translating: it should not come on top.
        self.release_memory()
        try:
            return program.lower(self.weights, *arguments).compile()
        finally:
            note.cancel()
            self.release_memory()
