"""The programs of a loaded export: traced here, and compiled once for each shape.

An export's own `.jaxexport` files are for other programs; they contain calls of machine code and
run only when the user trusts them.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from automoe_jax.decoding import beam, evolved_engine, native, native_engine, parts, xla_engine
from automoe_jax.decoding.batching import Batch
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.system import program_files, user_cache
from automoe_jax.system.errors import UserError

# Beam size and kernels.
PROGRAM = "program_beam{}_{}.jaxexport"
# Taking a program from its file is faster than this.
SLOW_COMPILE_S = 0.4
_ENGINES = {"native": native_engine, "xla": xla_engine}


def search(kernels: str, spec: ModelSpec, n_words: int, beam_size: int) -> Callable[..., Any]:
    """The translation of a batch: `beam.search`, of weights and its arrays, with a dict of results.

    `n_words` is the size of the target vocabulary.
    """
    engine = _engine(kernels, spec)
    own = functools.partial(beam.search, engine, spec, n_words, beam_size)

    def run(*arguments):
        return own(*arguments)._asdict()

    return run


def _engine(kernels: str, spec: ModelSpec) -> ModuleType:
    return evolved_engine if spec.subnet.cell == "evolved" else _ENGINES[kernels]


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of an export for one kind of kernels; other fields as in `Translator.load`."""

    spec: ModelSpec
    n_words: int
    kernels: str
    weights: dict[str, Any]  # on `device`, in the layout of the kernels
    device: Any  # jax.Device
    on_compile: Callable[[str], None]
    release_memory: Callable[[], None]
    trusted: Path | None  # an export whose own programs are run
    _programs: dict[int, Any] = dataclasses.field(default_factory=dict)
    _compiled: dict[tuple[int, ...], Callable] = dataclasses.field(default_factory=dict)
    _compiling: Any = dataclasses.field(default_factory=threading.Lock)

    def program(self, beam_size: int) -> Any:
        """The program of a beam size, under `jax.jit`."""
        if beam_size not in self._programs:
            run = search(self.kernels, self.spec, self.n_words, beam_size)
            if self.trusted is not None:
                run = self._exported(self.trusted / PROGRAM.format(beam_size, self.kernels))
            self._programs[beam_size] = jax.jit(run)
        return self._programs[beam_size]

    def _exported(self, path: Path) -> Callable[..., Any]:
        """The program in an export; `UserError` where it cannot be read or is of other weights."""
        try:
            exported = jax_export.deserialize(bytearray(path.read_bytes()))
        except Exception as e:  # jax.export raises many kinds of errors on a damaged file
            reason = str(e) or type(e).__name__
            raise UserError(f"program {path} cannot be read: {reason}") from None
        given = [(x.shape, x.dtype) for x in jax.tree.leaves(self.weights)]
        if given != [(x.shape, x.dtype) for x in exported.in_avals[: len(given)]]:
            raise UserError(f"program {path} is of other weights; load the export again")
        return exported.call

    def of_parts(self, beam_size: int) -> tuple[Callable[..., Any], ...]:
        """Programs of parts of a translation, see `parts.programs`."""
        engine = _engine(self.kernels, self.spec)
        return parts.programs(engine, self.spec, self.n_words, beam_size)

    @property
    def count(self) -> int:
        """The number of programs that were compiled, or read from their files, so far."""
        return len(self._compiled)

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
        """The program for arguments of these shapes, from its file or compiled."""
        rows, length = arguments[0].shape
        what = f"{rows} sentence(s) of up to {length} tokens, beam {beam_size}"
        note = threading.Timer(SLOW_COMPILE_S, lambda: self.on_compile(what))
        note.start()
        # Compiling takes more memory than translating: it should not come on top.
        self.release_memory()
        try:
            about = (
                f"{self.kernels} kernels {native.CALLS}, beam {beam_size} of {self.n_words} words"
            )
            about += f", {self.spec}"
            folder = None if self.trusted is not None else _folder()
            made = program_files.make(
                self.program(beam_size), about, (self.weights, *arguments), folder, [self.device]
            )
            made.keep()
            return made.program
        finally:
            note.cancel()
            self.release_memory()


def _folder() -> Path | None:
    """The process's compilation cache, else the user's own; None where there is neither."""
    with contextlib.suppress(OSError):  # a cache is optional
        return program_files.of_cache() or user_cache.private(user_cache.folder() / "programs")
    return None
