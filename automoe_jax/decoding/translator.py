"""`Translator`: loads an export and translates with it.

Imports no training code: it needs JAX and the tokenizer's library.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture import subnet
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.decoding import manifest as manifests
from automoe_jax.decoding import translation, weight_file
from automoe_jax.decoding.batching import BATCH_TOKENS
from automoe_jax.decoding.manifest import WEIGHTS, read_manifest
from automoe_jax.decoding.programs import Programs
from automoe_jax.decoding.translation import EMPTY, Hypothesis, Settings, Translation
from automoe_jax.decoding.weights import Weights, unpack
from automoe_jax.system import compile_cache, files
from automoe_jax.system.errors import UserError

# JAX's compilation cache, beside the programs.
COMPILED = "compiled"
# Most tokens of a translation, as in the published scripts.
MAX_LENGTH = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Translator:
    """An exported subnet, ready to run. Made by `Translator.load`.

    Attributes:
      folder: of the export.
      manifest: of the export.
      subnet: its architecture.
      programs: its compiled programs.
      tokenizer: None for an export that is run on token ids.
      kernels: "native", the project's kernels for CPUs, or "xla".
      why_xla: why "auto" did not choose the native kernels, in one line; else "".
    """

    folder: Path
    manifest: dict[str, Any]
    subnet: Subnet
    programs: Programs
    tokenizer: Tokenizer | None
    kernels: str
    why_xla: str

    @classmethod
    def load(
        cls,
        folder: str | Path,
        platform: str = "cpu",
        kernels: str = "auto",
        on_compile: Callable[[str], None] = lambda what: None,
        release_memory: Callable[[], None] = lambda: None,
    ) -> "Translator":
        """Reads an export.

        A process without a JAX compilation cache gets one in the export's folder, if that can be
        written: the second start is then fast. The programs and that cache contain code that is
        run: load only exports that you trust.

        Args:
          folder: of the export.
          platform: "cpu" or "gpu"; what to run on.
          kernels: "native" for the project's kernels, which need a CPU and, once, a C compiler;
            "xla" for XLA's operations alone; "auto" for "native" where it is available.
          on_compile: called from another thread with what is compiled, where that takes long.
          release_memory: called before and after each compilation, which frees much memory; may
            have malloc return it to the system.

        Raises:
          UserError: no export, one that is damaged, or not made for this platform or kernels.
        """
        folder = files.expanded(folder)
        manifest = read_manifest(folder)
        device = manifests.find_device(folder, manifest, platform)
        kernels, why_xla = manifests.choose_kernels(folder, manifest, platform, kernels)
        weights = jax.device_put(_load_weights(folder, manifest, kernels), device)
        tokenizer = tokenizers.load(folder / "tokenizer") if manifest["tokenizer"] else None
        if not compile_cache.enabled() and os.access(folder, os.W_OK):
            with contextlib.suppress(OSError):  # the cache is optional
                compile_cache.enable(folder / COMPILED, environment=False)
        programs = Programs(folder, kernels, weights, device, on_compile, release_memory)
        arch = subnet.from_json(manifest["subnet"])
        return cls(folder, manifest, arch, programs, tokenizer, kernels, why_xla)

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
                f"export {self.folder} has no tokenizer (its weights are "
                f"{self.manifest['weights_from']}): it can be timed, not translated with"
            )
        texts = [s.strip() for s in sentences]
        full = [i for i, text in enumerate(texts) if text]
        ids = self.tokenizer.encode([texts[i] for i in full])
        found = self.translate_ids(
            ids, beam_size, length_penalty, num_hypotheses, max_length, batch_tokens, progress
        )
        results = [EMPTY] * len(texts)
        for i, one in zip(full, found, strict=True):
            results[i] = _with_texts(one, self.tokenizer)
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
        settings = self.check(beam_size, length_penalty, num_hypotheses, max_length)
        translation.check_ids(sources, self.manifest["vocab_sizes"][0])
        return translation.translate_ids(
            self.programs, self.subnet, sources, settings, batch_tokens, progress
        )

    def check(
        self, beam_size: int | None, length_penalty: float, num_hypotheses: int, max_length: int
    ) -> Settings:
        """The settings, with the default beam size where none is given.

        Raises:
          UserError: one of them is not allowed.
        """
        beam_size = self.beam_size(beam_size)
        return translation.checked(Settings(beam_size, length_penalty, num_hypotheses, max_length))

    def beam_size(self, wanted: int | None = None) -> int:
        """The beam size to use; `UserError` where the export does not have the wanted one."""
        return manifests.choose_beam_size(self.folder, self.manifest, wanted)

    def program(self, beam_size: int) -> Any:
        """The exported program of a beam size, under `jax.jit`."""
        return self.programs.program(self.beam_size(beam_size))

    def run(
        self,
        source_BS: np.ndarray,
        beam_size: int,
        time: int,
        min_length: int,
        max_length: int,
        length_penalty: float,
    ) -> dict[str, jax.Array]:
        """Runs the program; see `export.program`."""
        numbers = (time, min_length, max_length, length_penalty)
        return self.programs.run(source_BS, self.beam_size(beam_size), *numbers)


def _load_weights(folder: Path, manifest: dict[str, Any], kernels: str) -> Weights:
    """The weights in the layout of these kernels; `UserError` where they are of another subnet."""
    weights = weight_file.load(folder / WEIGHTS)
    if wrong := manifests.mismatch(weights, manifest):
        raise UserError(
            f"weights {folder / WEIGHTS} do not fit the manifest beside them: {wrong}; write the "
            "export again with launch/export.py"
        )
    return weights if kernels == "native" else unpack(weights, manifest["vocab_sizes"][1])


def _with_texts(found: Translation, tokenizer: Tokenizer) -> Translation:
    texts = tokenizer.decode([h.ids for h in found.hypotheses])
    named = (Hypothesis(t, h.score, h.ids) for h, t in zip(found.hypotheses, texts, strict=True))
    return Translation(tuple(named), found.cut)
