"""`Translator`: loads an export and translates with it.

Imports no training code: what it needs is JAX and the tokenizer's library.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from automoe_jax.architecture import subnet
from automoe_jax.architecture.ids import EOS_ID
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.decoding import native, weight_file
from automoe_jax.decoding.batching import BATCH_TOKENS, MAX_SOURCE, Batch, batches, stragglers
from automoe_jax.decoding.weights import unpack
from automoe_jax.decoding.xla_engine import NEVER
from automoe_jax.system import compile_cache, files, workdir
from automoe_jax.system import malloc as huge_pages
from automoe_jax.system.errors import UserError

KIND = "export"
KERNELS = ("native", "xla")
# Beam size and kernels.
PROGRAM = "program_beam{}_{}.jaxexport"
# How the weights are laid out; an export with another layout cannot be run.
LAYOUT = f"panels of {native.PANEL}, calls {native.CALLS}"
# JAX's compilation cache, beside the programs.
COMPILED = "compiled"
SLOW_COMPILE_S = 0.4
WEIGHTS = "weights.safetensors"
DEFAULT_BEAM = 5
# Most words of a translation, as in the published scripts.
MAX_LENGTH = 200
# What `translate` takes at most; more would be a slip of the hand.
MOST_LENGTH = 4096
MOST_PENALTY = 10.0


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One translation of a sentence. `score`: sum of log probabilities over a power of length."""

    text: str
    score: float
    ids: tuple[int, ...]  # without eos


@dataclasses.dataclass(frozen=True)
class Translation:
    """What became of a sentence: hypotheses, best first; `cut` where it was too long."""

    hypotheses: tuple[Hypothesis, ...]
    cut: bool = False

    @property
    def text(self) -> str:
        return self.hypotheses[0].text

    @property
    def score(self) -> float:
        return self.hypotheses[0].score


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What an export says of itself; `UserError` where there is none."""
    folder = files.expanded(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"export folder {folder} {what}; make one with launch/export.py")
    return workdir.read(folder, KIND)


EMPTY = Translation((Hypothesis("", 0.0, ()),))


class Translator:
    """An exported subnet, ready to run. Made by `Translator.load`.

    Attributes:
      manifest: what the export says of itself.
      subnet: its architecture.
      tokenizer: None for an export that is run on token ids.
      kernels: what it runs on: "native", the project's kernels for CPUs, or "xla".
      why_xla: why not on the kernels, in one line; "" where it does, or was not to.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        weights: dict[str, Any],
        tokenizer: Tokenizer | None,
        device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]
        kernels: str,
        why_xla: str,
        on_compile: Callable[[str], None],
    ):
        self._folder = folder
        self.manifest = manifest
        self.subnet: Subnet = subnet.from_json(manifest["subnet"])
        self.tokenizer = tokenizer
        self.kernels = kernels
        self.why_xla = why_xla
        self._device = device
        self._weights = jax.device_put(weights, device)
        self._programs: dict[int, Any] = {}
        self._on_compile = on_compile
        self._compiling = threading.Lock()
        self._compiled: dict[tuple[int, ...], Callable] = {}

    @classmethod
    def load(
        cls,
        folder: str | Path,
        platform: str = "cpu",
        kernels: str = "auto",
        on_compile: Callable[[str], None] = lambda what: None,
    ) -> "Translator":
        """Reads an export.

        Where this process has no compilation cache of JAX's yet, it gets one in this export, if
        that can be written: the second start is then fast. Like the programs beside it, what stands
        there is run: load exports of people you trust.

        Args:
          folder: of the export.
          platform: "cpu" or "gpu"; what to run on.
          kernels: "native" for the project's kernels, which need a CPU and, once, a C compiler;
            "xla" for XLA's operations alone; "auto" for the first where it can be had.
          on_compile: called with what is being compiled, where that takes a while (it is not in the
            cache), from a thread of its own.

        Raises:
          UserError: no export, one that is damaged, or not made for this platform or kernels.
        """
        folder = files.expanded(folder)
        manifest = read_manifest(folder)
        names = {"cpu": ("cpu",), "gpu": ("cuda", "rocm"), "tpu": ("tpu",)}.get(platform)
        if names is None:
            raise UserError(f"platform is {platform!r}; allowed: cpu, gpu, tpu")
        if not set(names) & set(manifest["platforms"]):
            raise UserError(
                f"export {folder} was made for {', '.join(manifest['platforms'])}; export it "
                f"again with --config.export.platforms=cpu,{names[0]}"
            )
        if manifest.get("layout") != LAYOUT:
            raise UserError(
                f"export {folder} was written by another version; write it again with "
                "launch/export.py"
            )
        kernels, why_xla = _kernels(kernels, platform, manifest, folder)
        try:
            device = jax.local_devices(backend=platform)[0]
        except RuntimeError:
            raise UserError(f"JAX finds no {platform} here; use --platform=cpu") from None
        weights = weight_file.load(folder / WEIGHTS)
        if kernels == "xla":
            weights = unpack(weights, manifest["vocab_sizes"][1])
        tokenizer = tokenizers.load(folder / "tokenizer") if manifest["tokenizer"] else None
        if not compile_cache.enabled() and os.access(folder, os.W_OK):
            with contextlib.suppress(OSError):  # translating does without
                compile_cache.enable(folder / COMPILED, environment=False)
        return cls(folder, manifest, weights, tokenizer, device, kernels, why_xla, on_compile)

    def translate(
        self,
        sentences: Sequence[str],
        beam_size: int | None = None,
        length_penalty: float = 0.6,
        num_hypotheses: int = 1,
        max_length: int = MAX_LENGTH,
        batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Translation]:
        """Translates sentences, in their order.

        Args:
          sentences: texts; one that is empty or blank gives an empty translation.
          beam_size: one of the export's; None for 5, or the largest where 5 was not exported.
          length_penalty: power of the length that scores are divided by.
          num_hypotheses: how many to return, at most `beam_size`.
          max_length: most tokens of a translation.
          batch_tokens: source tokens, padding included, that are translated together on a core.
          progress: called with (sentences done, all).

        Raises:
          UserError: no such beam size, or the export has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                f"export {self._folder} has no tokenizer (its weights are "
                f"{self.manifest['weights_from']}): it can be timed, not translated with"
            )
        texts = [s.strip() for s in sentences]
        full = [i for i, text in enumerate(texts) if text]
        ids = self.tokenizer.encode([texts[i] for i in full])
        found = self.translate_ids(
            ids, beam_size, length_penalty, num_hypotheses, max_length, batch_tokens, progress
        )
        results = [EMPTY] * len(texts)
        for i, translation in zip(full, found, strict=True):
            decoded = self.tokenizer.decode([h.ids for h in translation.hypotheses])
            hypotheses = tuple(
                dataclasses.replace(h, text=text)
                for h, text in zip(translation.hypotheses, decoded, strict=True)
            )
            results[i] = dataclasses.replace(translation, hypotheses=hypotheses)
        return results

    def translate_ids(
        self,
        sources: Sequence[Sequence[int]],
        beam_size: int | None = None,
        length_penalty: float = 0.6,
        num_hypotheses: int = 1,
        max_length: int = MAX_LENGTH,
        batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Translation]:
        """As `translate`, from and to token ids; sources end with eos, texts stay empty."""
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}; at least 1 is needed")
        beam_size, length_penalty, num_hypotheses, max_length = self.check(
            beam_size, length_penalty, num_hypotheses, max_length
        )
        words = self.manifest["vocab_sizes"][0]
        for i, source in enumerate(sources):
            if source and not 0 <= min(source) <= max(source) < words:
                raise UserError(
                    f"sentence {i + 1} has token ids {min(source)} to {max(source)}; the model has "
                    f"0 to {words - 1}"
                )
        cut = [len(s) > MAX_SOURCE for s in sources]
        sources = [s if len(s) <= MAX_SOURCE else [*s[: MAX_SOURCE - 1], EOS_ID] for s in sources]
        results: list[Translation] = [EMPTY] * len(sources)
        # First with a cache for usual lengths; what does not end in it is run again with a full
        # one. The result is that of the full one.
        full = max_length + 1
        step_bytes = 8 * beam_size * self.subnet.qkv_dim * len(self.subnet.decoder.layers)
        left = [i for i, source in enumerate(sources) if source]
        done = len(sources) - len(left)
        for last in (False, True):
            unfinished = [] if last else stragglers(sources)
            left = sorted(set(left) - set(unfinished))
            work = list(batches(sources, left, full, step_bytes, last, batch_tokens))

            def run(batch: Batch) -> dict[str, np.ndarray]:
                numbers = (batch.time, 1, max_length, length_penalty)
                return {
                    name: np.asarray(value)
                    for name, value in self.run(batch.source_BS, beam_size, *numbers).items()
                }

            for batch, out in self._in_parallel(run, work, beam_size):
                for row, i in enumerate(batch.rows):
                    if out["complete_B"][row] or batch.time == full:
                        hypotheses = _hypotheses(out, row)[:num_hypotheses]
                        results[i] = Translation(tuple(hypotheses), cut[i])
                        done += 1
                    else:
                        unfinished.append(i)
                progress(done, len(sources))
            left = unfinished
        return results

    def check(
        self, beam_size: int | None, length_penalty: float, num_hypotheses: int, max_length: int
    ) -> tuple[int, float, int, int]:
        """The same settings, with a beam size where none is given.

        Raises:
          UserError: one of them is not allowed.
        """
        beam_size = self.beam_size(beam_size)
        if not 1 <= num_hypotheses <= beam_size:
            raise UserError(
                f"num_hypotheses is {num_hypotheses}; allowed: 1 to the beam size {beam_size}"
            )
        if not 1 <= max_length <= MOST_LENGTH:
            raise UserError(f"max_length is {max_length}; allowed: 1 to {MOST_LENGTH}")
        if not abs(length_penalty) <= MOST_PENALTY:
            raise UserError(
                f"length_penalty is {length_penalty}; allowed: -{MOST_PENALTY} to {MOST_PENALTY}"
            )
        return beam_size, length_penalty, num_hypotheses, max_length

    def _in_parallel(self, run: Callable[[Batch], Any], work: Sequence[Batch], beam_size: int):
        """(batch, result) of each batch, as they come.

        Several batches at a time, a core for each, pass by what cores spend waiting for each
        other within one. What has to be compiled goes first, one after the other: a batch beside a
        compilation is what would take most memory.
        """
        threads = min(native.n_threads(), len(work) // 2) if self.kernels == "native" else 1
        if threads < 2:
            for batch in work:
                yield batch, run(batch)
            return
        huge_pages.return_large_blocks()
        shapes = {(beam_size, *batch.source_BS.shape, batch.time): batch for batch in work}
        first = [batch for shape, batch in shapes.items() if shape not in self._compiled]
        for batch in first:
            yield batch, run(batch)
        work = [batch for batch in work if not any(batch is other for other in first)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(native.one_thread_a_call())
            pool = stack.enter_context(futures.ThreadPoolExecutor(threads))
            # What takes longest first, so that all end at about the same time.
            order = sorted(work, key=lambda batch: -batch.source_BS.size)
            running = {pool.submit(run, batch): batch for batch in order}
            try:
                for future in futures.as_completed(running):
                    yield running[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def beam_size(self, wanted: int | None = None) -> int:
        """The beam size to use; `UserError` where the export does not have the wanted one."""
        sizes = self.manifest["beam_sizes"]
        if wanted is None:
            return DEFAULT_BEAM if DEFAULT_BEAM in sizes else max(sizes)
        if wanted not in sizes:
            raise UserError(
                f"beam size {wanted} is not in export {self._folder}; it has "
                f"{', '.join(map(str, sizes))}; for another, export again with "
                f"--config.export.beam_sizes={wanted},"
            )
        return wanted

    def program(self, beam_size: int) -> Any:
        """The exported program of a beam size, under `jax.jit`."""
        beam_size = self.beam_size(beam_size)
        if beam_size not in self._programs:
            path = self._folder / PROGRAM.format(beam_size, self.kernels)
            try:
                exported = jax_export.deserialize(bytearray(path.read_bytes()))
            except Exception as e:  # the reader of jax.export raises whatever it stumbles over
                reason = str(e) or type(e).__name__
                raise UserError(f"program {path} cannot be read: {reason}") from None
            given = [(x.shape, x.dtype) for x in jax.tree.leaves(self._weights)]
            if given != [(x.shape, x.dtype) for x in exported.in_avals[: len(given)]]:
                raise UserError(f"program {path} is of other weights; load the export again")
            self._programs[beam_size] = jax.jit(exported.call)
        return self._programs[beam_size]

    def run(
        self,
        source_BS: np.ndarray,
        beam_size: int,
        time: int,
        min_length: int,
        max_length: int,
        length_penalty: float,
    ) -> dict[str, jax.Array]:
        """One call of the exported program; see `export.program`."""
        arguments = (
            source_BS,
            np.arange(time, dtype=np.int32),
            np.int32(min_length),
            np.int32(max_length),
            np.float32(length_penalty),
        )
        arguments = jax.device_put(arguments, self._device)
        shape = (beam_size, *source_BS.shape, time)
        if shape not in self._compiled:
            with self._compiling:  # one shape at a time, and each once
                if shape not in self._compiled:
                    self._compiled[shape] = self._compile(beam_size, arguments)
        return self._compiled[shape](self._weights, *arguments)

    def _compile(self, beam_size: int, arguments: tuple[jax.Array, ...]) -> Callable:
        """The program for arguments of these shapes, from the cache where it is there."""
        rows, length = arguments[0].shape
        what = f"{rows} sentence(s) of up to {length} tokens, beam {beam_size}"
        program = self.program(beam_size)
        # From the cache it comes faster than that.
        note = threading.Timer(SLOW_COMPILE_S, lambda: self._on_compile(what))
        note.start()
        # Compiling takes more memory than translating: not both at a time.
        huge_pages.trim()
        try:
            return program.lower(self._weights, *arguments).compile()
        finally:
            note.cancel()
            huge_pages.trim()


def _kernels(wanted: str, platform: str, manifest: dict[str, Any], folder: Path) -> tuple[str, str]:
    """The kernels to run on, and why not the native ones."""
    if wanted not in ("auto", *KERNELS):
        raise UserError(f"kernels is {wanted!r}; allowed: auto, {', '.join(KERNELS)}")
    why = ""
    if platform != "cpu":
        why = f"they run on CPUs, not on {platform}"
    elif wanted != "xla":
        why = native.reason()
    if not why and "native" not in manifest["kernels"]:
        why = f"export {folder} has no program for them"
    if wanted == "native" and why:
        raise UserError(f"the native kernels cannot be used: {why}; use --kernels=xla")
    chosen = "xla" if why or wanted == "xla" else "native"
    if chosen not in manifest["kernels"]:
        raise UserError(
            f"export {folder} has programs for {', '.join(manifest['kernels'])} only, and these "
            f"cannot be used: {why or 'xla was asked for'}; write it again with launch/export.py"
        )
    return chosen, why if wanted == "auto" and platform == "cpu" else ""


def _hypotheses(out: dict[str, np.ndarray], row: int) -> list[Hypothesis]:
    """What the program returned for one sentence."""
    found = zip(out["tokens_BJT"][row], out["score_BJ"][row], out["length_BJ"][row], strict=True)
    return [
        Hypothesis("", float(score), tuple(int(x) for x in tokens[: length - 1]))
        for tokens, score, length in found
        if score > NEVER / 2
    ]
