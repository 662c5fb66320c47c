"""SentencePiece joint BPE with the special ids of the published models."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece as spm

from automoe_jax import files
from automoe_jax.errors import UserError
from automoe_jax.ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID

_SPM, _INFO = "sentencepiece.model", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Group `tokenizer` of a config.

    Attributes:
      vocab_size: pieces, special ones included.
      character_coverage: share of characters that get a piece; the rest is unknown.
      split_digits: every digit its own piece, so that numbers are copied digit by digit.
      max_sentences: most lines (source and target) to train on, spread evenly over the corpus.
    """

    vocab_size: int = 32_768
    character_coverage: float = 1.0
    split_digits: bool = False
    max_sentences: int = 4_000_000

    def __post_init__(self):
        if self.vocab_size <= UNK_ID + 1:
            raise UserError(f"tokenizer.vocab_size is {self.vocab_size}; at least 5 is needed")
        if not 0.98 <= self.character_coverage <= 1:
            raise UserError(
                f"tokenizer.character_coverage is {self.character_coverage}; allowed: 0.98 to 1"
            )


class Tokenizer:
    """Text to ids and back. Ids: bos 0, pad 1, eos 2, unk 3."""

    def __init__(self, processor: spm.SentencePieceProcessor):
        self._processor = processor

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def model(self) -> bytes:
        """The SentencePiece model: equal for tokenizers that give equal ids."""
        return self._processor.serialized_model_proto()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Ids of each sentence, eos at the end."""
        return self._processor.encode(
            list(sentences), out_type=int, add_eos=True, num_threads=os.cpu_count() or 1
        )

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sentence; special ids are left out, unknown ones become a mark."""
        special = (BOS_ID, PAD_ID, EOS_ID)
        return self._processor.decode([[int(i) for i in x if i not in special] for x in ids])

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads what `train` wrote; `UserError` where it is missing or broken."""
        info = files.read_json(folder / _INFO, "tokenizer")
        if not isinstance(info, dict) or info.get("kind") != "sentencepiece":
            raise UserError(f"{folder / _INFO} is not a tokenizer of kind sentencepiece")
        path = folder / _SPM
        try:
            return cls(spm.SentencePieceProcessor(model_proto=path.read_bytes()))
        except (OSError, RuntimeError) as e:
            raise UserError(f"tokenizer model {path} cannot be read: {e}") from None


def train(sentences: Iterable[str], folder: Path, config: TokenizerConfig):
    """Trains joint BPE on sentences of both languages and writes it to `folder`.

    Raises:
      UserError: the text has too few different words for the vocabulary.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    prefix = temporary / "sentencepiece"
    try:
        with _quiet_stderr():
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_prefix=str(prefix),
                model_type="bpe",
                vocab_size=config.vocab_size,
                character_coverage=config.character_coverage,
                split_digits=config.split_digits,
                bos_id=BOS_ID,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                num_threads=os.cpu_count() or 1,
                minloglevel=2,
            )
    except RuntimeError as e:
        # "INTERNAL: file(line) [condition] What is wrong.", where the last part may be missing.
        reason = str(e).rpartition("] ")[2].strip() or str(e)
        raise UserError(
            f"tokenizer.vocab_size {config.vocab_size} does not fit the training text: {reason}"
        ) from None
    info = {"version": 1, "kind": "sentencepiece", **dataclasses.asdict(config)}
    files.write_json(temporary / _INFO, info)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, folder)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """SentencePiece's C++ writes progress to file descriptor 2 whatever it is told."""
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
