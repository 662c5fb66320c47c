"""Loads an export and translates; needs JAX and the tokenizer's library, no training code."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from automoe_jax.architecture import subnet
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.decoding import manifest as manifests
from automoe_jax.decoding import translation, weight_file
from automoe_jax.decoding.batching import BATCH_TOKENS
from automoe_jax.decoding.programs import Programs
from automoe_jax.decoding.schema import MOST_BEAMS
from automoe_jax.decoding.translation import EMPTY, Hypothesis, Settings, Translation
from automoe_jax.decoding.weights import Weights, unpack
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

DEFAULT_BEAM = 5
# Most tokens of a translation, as in the published scripts.
MAX_LENGTH = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Translator:
    """An exported subnet, ready to run. Made by `Translator.load`."""

    folder: Path
    manifest: dict[str, Any]
    subnet: Subnet
    programs: Programs
    tokenizer: Tokenizer | None  # None for an export that is run on token ids
    kernels: str  # "native", the project's kernels for CPUs, or "xla"
    why_xla: str  # why "auto" did not choose the native kernels, in one line; else ""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        platform: str = "cpu",
        kernels: str = "auto",
        on_compile: Callable[[str], None] = lambda what: None,
        release_memory: Callable[[], None] = lambda: None,
        *,
        trust: bool = False,
    ) -> "Translator":
        """Reads an export; `UserError` if it is damaged or not made for this platform or kernels.

        An export is data: what is read is checked, and no code of it is run. Programs are traced
        here and kept, compiled, in the process's compilation cache, else in the user's own
        (`user_cache.folder`): the second start is then fast.

        Args:
          platform: "cpu" or "gpu"; what to run on.
          kernels: "native" for the project's kernels, which need a CPU and, once, a C compiler;
            "xla" for XLA's operations alone; "auto" for "native" where it is available.
          on_compile: called from another thread with what is compiled, where that takes long.
          release_memory: called before and after each compilation, which frees much memory; may
            have malloc return it to the system.
          trust: run the programs in the export instead of those that are traced here. They may
            contain any code.
        """
        folder = files.expanded(folder)
        manifest = manifests.read_manifest(folder)
        arch = subnet.from_json(manifest["subnet"])
        device = manifests.find_device(folder, manifest, platform)
        kernels, why_xla = manifests.choose_kernels(folder, manifest, platform, kernels)
        weights = jax.device_put(_load_weights(folder, manifest, kernels), device)
        tokenizer = tokenizers.load(folder / "tokenizer") if manifest["tokenizer"] else None
        programs = Programs(
            ModelSpec(arch, *manifest["base_dims"], gate=manifest["gate"]),
            manifest["vocab_sizes"][1],
            kernels, weights, device, on_compile, release_memory, folder if trust else None,
        )  # fmt: skip
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
        """Translates sentences, in their order; `UserError` without a tokenizer or the beam size.

        Args:
          sentences: texts; one that is empty or blank gives an empty translation.
          beam_size: one of the export's; None for 5, or the largest where 5 was not exported.
          length_penalty: power of the length that scores are divided by.
          num_hypotheses: how many to return, at most `beam_size`.
          max_length: most tokens of a translation.
          batch_tokens: source tokens, padding included, that are translated together on a core.
          progress: called with (sentences done, all).
        """
        if self.tokenizer is None:
            raise UserError(
                f"export {self.folder} has no tokenizer (its weights are "
                f"{self.manifest['weights_from']}): it can be timed, not translated with"
            )
        if isinstance(sentences, str) or not all(isinstance(s, str) for s in sentences):
            raise UserError("sentences must be a list of strings, one for each sentence")
        texts = [s.strip() for s in sentences]
        full = [i for i, text in enumerate(texts) if text]
        ids = self.tokenizer.encode([texts[i] for i in full])
        found = self.translate_ids(
            ids, beam_size, length_penalty, num_hypotheses, max_length, batch_tokens, progress
        )
        results = [EMPTY] * len(texts)
        for i, one in zip(full, found, strict=True):
            decoded = self.tokenizer.decode([h.ids for h in one.hypotheses])
            named = zip(decoded, one.hypotheses, strict=True)
            hypotheses = tuple(Hypothesis(text, h.score, h.ids) for text, h in named)
            results[i] = Translation(hypotheses, one.cut)
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
        words = self.manifest["vocab_sizes"][0]
        for i, source in enumerate(sources):
            if source and not 0 <= min(source) <= max(source) < words:
                raise UserError(
                    f"sentence {i + 1} has token ids {min(source)} to {max(source)}; the model has "
                    f"0 to {words - 1}"
                )
        return translation.translate_ids(
            self.programs, self.subnet, sources, settings, batch_tokens, progress
        )

    def check(
        self, beam_size: int | None, length_penalty: float, num_hypotheses: int, max_length: int
    ) -> Settings:
        """The settings, with the default beam size for None; `UserError` if one is not allowed."""
        beam_size = self.beam_size(beam_size)
        return translation.checked(Settings(beam_size, length_penalty, num_hypotheses, max_length))

    def beam_size(self, wanted: int | None = None) -> int:
        """The wanted or the default beam size; `UserError` where the export has no such program."""
        sizes = self.manifest["beam_sizes"]
        if wanted is None:
            return default_beam(sizes)
        if wanted not in sizes:
            line = (
                f"beam size {wanted} is not in export {self.folder}; it has "
                f"{', '.join(map(str, sizes))}"
            )
            if 1 <= wanted <= MOST_BEAMS:
                more = ",".join(map(str, sorted({*sizes, wanted})))
                line += f"; for another, export again with --config.export.beam_sizes={more}"
            raise UserError(line)
        return wanted


def default_beam(sizes: Sequence[int]) -> int:
    """The beam size for an export with programs of these, where none is asked for."""
    return DEFAULT_BEAM if DEFAULT_BEAM in sizes else max(sizes)


def _load_weights(folder: Path, manifest: dict[str, Any], kernels: str) -> Weights:
    """The weights in the layout of these kernels; `UserError` where they are of another subnet."""
    path = folder / manifests.WEIGHTS
    weights = weight_file.load(path)
    if wrong := manifests.mismatch(weights, manifest):
        raise UserError(
            f"weights {path} do not fit the manifest beside them: {wrong}; write the "
            "export again with launch/export.py"
        )
    return weights if kernels == "native" else unpack(weights, manifest["vocab_sizes"][1])
