"""`Translator`: loads an export and translates with it.

Imports no training code: what it needs is JAX, safetensors and the tokenizer's library.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from safetensors import SafetensorError
from safetensors.numpy import load_file

from automoe_jax import files, subnet, workdir
from automoe_jax.data import tokenizer as tokenizers
from automoe_jax.data.tokenizer import Tokenizer
from automoe_jax.decoding.beam import NEVER
from automoe_jax.errors import UserError
from automoe_jax.ids import EOS_ID, PAD_ID
from automoe_jax.subnet import Subnet

KIND = "export"
PROGRAM = "program_beam{}.jaxexport"
WEIGHTS = "weights.safetensors"
DEFAULT_BEAM = 5
# Longest source in tokens; what is longer is cut.
MAX_SOURCE = 1024
# Most words of a translation, as in the published scripts.
MAX_LENGTH = 200
# What `translate` takes at most; more would be a slip of the hand.
MOST_LENGTH = 4096
MOST_PENALTY = 10.0
# Shapes that programs are compiled for.
SOURCE_BUCKETS = (16, 32, 64, 128, 256, 512, MAX_SOURCE)
TIME_BUCKETS = (16, 32, 64, 128)
# A bucket of so few sentences, among many others, gets no shape of its own.
FEW = 8
# Source positions of a batch; more gains nothing on a few cores.
BATCH_TOKENS = 1024


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
    """An exported subnet, ready to run. Made by `Translator.load`."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        weights: dict[str, Any],
        tokenizer: Tokenizer | None,
        device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]
    ):
        self._folder = folder
        self.manifest = manifest
        self.subnet: Subnet = subnet.from_json(manifest["subnet"])
        self.tokenizer = tokenizer
        self._device = device
        self._weights = jax.device_put(weights, device)
        self._programs: dict[int, Callable] = {}

    @classmethod
    def load(cls, folder: str | Path, platform: str = "cpu") -> "Translator":
        """Reads an export.

        Args:
          folder: of the export.
          platform: "cpu" or "gpu"; what to run on.

        Raises:
          UserError: no export, one that is damaged, or not made for this platform.
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
        try:
            device = jax.local_devices(backend=platform)[0]
        except RuntimeError:
            raise UserError(f"JAX finds no {platform} here; use --platform=cpu") from None
        try:
            weights = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as e:
            raise UserError(f"weights {folder / WEIGHTS} cannot be read: {e}") from None
        tokenizer = tokenizers.load(folder / "tokenizer") if manifest["tokenizer"] else None
        return cls(folder, manifest, weights, tokenizer, device)

    def translate(
        self,
        sentences: Sequence[str],
        beam_size: int | None = None,
        length_penalty: float = 0.6,
        num_hypotheses: int = 1,
        max_length: int = MAX_LENGTH,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Translation]:
        """Translates sentences, in their order.

        Args:
          sentences: texts; one that is empty or blank gives an empty translation.
          beam_size: one of the export's; None for 5, or the largest where 5 was not exported.
          length_penalty: power of the length that scores are divided by.
          num_hypotheses: how many to return, at most `beam_size`.
          max_length: most tokens of a translation.
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
            ids, beam_size, length_penalty, num_hypotheses, max_length, progress
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
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Translation]:
        """As `translate`, from and to token ids; sources end with eos, texts stay empty."""
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
        cut = [len(s) > MAX_SOURCE for s in sources]
        sources = [s if len(s) <= MAX_SOURCE else [*s[: MAX_SOURCE - 1], EOS_ID] for s in sources]
        results: list[Translation] = [EMPTY] * len(sources)
        # First with a cache for usual lengths; what does not end in it is run again with a full
        # one. The result is that of the full one.
        full = max_length + 1
        left, done = list(range(len(sources))), 0
        for last in (False, True):
            unfinished = [] if last else _stragglers(sources)
            left = [i for i in left if i not in unfinished]
            for rows, source_BS in _batches(sources, left, one_bucket=last):
                usual = _bucket(3 * source_BS.shape[1] // 2, TIME_BUCKETS)
                time = full if last else min(usual, full)
                out = self.run(source_BS, beam_size, time, 1, max_length, length_penalty)
                out = {name: np.asarray(value) for name, value in out.items()}
                for row, i in enumerate(rows):
                    if out["complete_B"][row] or time == full:
                        hypotheses = _hypotheses(out, row)[:num_hypotheses]
                        results[i] = Translation(tuple(hypotheses), cut[i])
                    else:
                        unfinished.append(i)
                done += len(rows) if time == full else int(out["complete_B"][: len(rows)].sum())
                progress(done, len(sources))
            left = unfinished
        return results

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

    def program(self, beam_size: int) -> Callable:
        """The exported program of a beam size, compiled once per shape when it is called."""
        beam_size = self.beam_size(beam_size)
        if beam_size not in self._programs:
            path = self._folder / PROGRAM.format(beam_size)
            try:
                exported = jax_export.deserialize(bytearray(path.read_bytes()))
            except Exception as e:  # the reader of jax.export raises whatever it stumbles over
                reason = str(e) or type(e).__name__
                raise UserError(f"program {path} cannot be read: {reason}") from None
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
        return self.program(beam_size)(self._weights, *jax.device_put(arguments, self._device))


def _batches(sources: Sequence[Sequence[int]], chosen: Sequence[int], one_bucket: bool):
    """(indices, padded ids) of batches: by length, few different shapes.

    `one_bucket` puts all sentences into the bucket of the longest: for few of them, compiling for
    several shapes would cost more than their padding.
    """
    by_time: dict[int, list[int]] = {}
    for i in sorted(chosen, key=lambda i: len(sources[i])):
        by_time.setdefault(_bucket(len(sources[i]), SOURCE_BUCKETS), []).append(i)
    if one_bucket and by_time:
        by_time = {max(by_time): [i for own in by_time.values() for i in own]}
    for time, own in by_time.items():
        # Powers of two, and all batches of a bucket alike: few shapes to compile. Rows that only
        # fill up are all padding and end at once.
        n_rows = min(1 << (len(own) - 1).bit_length(), BATCH_TOKENS // time)
        for at in range(0, len(own), n_rows):
            rows = own[at : at + n_rows]
            yield rows, pad([sources[i] for i in rows], n_rows, time)


def _stragglers(sources: Sequence[Sequence[int]]) -> list[int]:
    """Sentences of buckets too small to be worth a shape of their own: they are run at the end."""
    buckets = [_bucket(len(source), SOURCE_BUCKETS) for source in sources]
    few = {b for b, n in collections.Counter(buckets).items() if n <= FEW < len(sources) / 16}
    return [i for i, bucket in enumerate(buckets) if bucket in few]


def _hypotheses(out: dict[str, np.ndarray], row: int) -> list[Hypothesis]:
    """What the program returned for one sentence."""
    found = zip(out["tokens_BJT"][row], out["score_BJ"][row], out["length_BJ"][row], strict=True)
    return [
        Hypothesis("", float(score), tuple(int(x) for x in tokens[: length - 1]))
        for tokens, score, length in found
        if score > NEVER / 2
    ]


def pad(sources: Sequence[Sequence[int]], rows: int, time: int) -> np.ndarray:
    """Token ids (rows, time), int32, padded on the right."""
    out = np.full((rows, time), PAD_ID, np.int32)
    for row, ids in zip(out, sources, strict=False):
        row[: len(ids)] = ids
    return out


def _bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds a length, or the largest."""
    return next((b for b in buckets if b >= length), buckets[-1])
