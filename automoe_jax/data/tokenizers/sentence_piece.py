"""SentencePiece joint BPE with the special ids of the published models."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

from automoe_jax.architecture.ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from automoe_jax.data.tokenizers.base import SideName, WordBorders, write_folder
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.system.errors import UserError

_SPM = "sentencepiece.model"
_BLANK = "\u2581"  # stands for a blank before a word


class SentencePiece:
    """A `Tokenizer` with one joint vocabulary."""

    kind = "sentencepiece"

    def __init__(self, processor: spm.SentencePieceProcessor, *, lowercase: bool = False):
        self._processor, self.lowercase = processor, lowercase

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        size = self._processor.get_piece_size()
        return size, size

    @property
    def content(self) -> bytes:
        # The pieces, in the order in which they are merged; a model has its training's paths, too.
        pieces = map(self._processor.id_to_piece, range(self._processor.get_piece_size()))
        return "\n".join([*pieces, "lowercase" * self.lowercase]).encode()

    def encode(self, sentences: Sequence[str], side: SideName = "source") -> list[list[int]]:
        del side  # one vocabulary
        return self._processor.encode(
            [x.lower() for x in sentences] if self.lowercase else list(sentences),
            out_type=int,
            add_eos=True,
            num_threads=os.cpu_count() or 1,
        )

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        special = (BOS_ID, PAD_ID, EOS_ID)
        return self._processor.decode([[int(i) for i in x if i not in special] for x in ids])

    def word_borders(self, side: SideName) -> WordBorders:
        del side  # one vocabulary
        pieces = map(self._processor.id_to_piece, range(self._processor.get_piece_size()))
        starts_V = np.array([piece.startswith(_BLANK) for piece in pieces])
        return np.zeros_like(starts_V), starts_V

    def pieces(self, ids: Sequence[int], side: SideName) -> list[str]:
        del side  # one vocabulary
        special = (BOS_ID, PAD_ID, EOS_ID)
        found = [self._processor.id_to_piece(int(i)).replace(_BLANK, " ") for i in ids]
        return ["" if i in special else piece for i, piece in zip(ids, found, strict=True)]

    @classmethod
    def load(cls, folder: Path, info: dict[str, Any]) -> "SentencePiece":
        """Reads the folder that `train` wrote; `UserError` if it is missing or broken.

        `info` is its `tokenizer.json`; that of earlier versions does not say `lowercase`.
        """
        path, lowercase = folder / _SPM, info.get("lowercase", False)
        try:
            processor = spm.SentencePieceProcessor(model_proto=path.read_bytes())
            return cls(processor, lowercase=lowercase)
        except (OSError, RuntimeError) as e:
            raise UserError(f"tokenizer model {path} cannot be read: {e}") from None


def train(sentences: Iterable[str], folder: Path, config: TokenizerConfig):
    """Trains joint BPE on both languages; `UserError` if the vocabulary is too large for them."""

    if config.lowercase:
        sentences = (sentence.lower() for sentence in sentences)
    settings = {x: getattr(config, x) for x in ("vocab_size", "character_coverage", "split_digits")}
    ids: dict[str, Any] = {"bos_id": BOS_ID, "pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}

    def fill(temporary: Path):
        try:
            with _quiet_stderr():
                spm.SentencePieceTrainer.train(
                    sentence_iterator=iter(sentences),
                    model_prefix=str(temporary / "sentencepiece"),
                    model_type="bpe",
                    **settings,
                    **ids,
                    num_threads=os.cpu_count() or 1,
                    minloglevel=2,
                )
        except RuntimeError as e:
            # "INTERNAL: file(line) [condition] Reason.", where the reason may be missing.
            reason = str(e).rpartition("] ")[2].strip() or str(e)
            raise UserError(
                f"tokenizer.vocab_size {config.vocab_size} does not fit the training text: "
                f"{_advice(reason)}"
            ) from None

    info = {
        "kind": SentencePiece.kind, **settings, "max_sentences": config.max_sentences,
        "lowercase": config.lowercase,
    }  # fmt: skip
    write_folder(folder, info, fill)


def _advice(reason: str) -> str:
    """What to do where SentencePiece refuses a vocabulary's size, else its own words."""
    if most := re.search(r"<= (\d+)", reason):
        return f"it is too large; give --config.tokenizer.vocab_size={most[1]} or less"
    if fewest := re.search(r"\d+ vs (\d+)", reason):
        return (
            f"it is smaller than the number of signs; give more than {fewest[1]}, or a lower "
            "--config.tokenizer.character_coverage, as 0.995"
        )
    return reason


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silences file descriptor 2, where SentencePiece's C++ code writes at any log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
