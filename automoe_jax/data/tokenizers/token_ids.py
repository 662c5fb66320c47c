"""Text that consists of token ids, for a model whose vocabulary is not available."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.data.tokenizers.base import INFO, SideName, write_folder
from automoe_jax.system.errors import UserError

_NUMBER = re.compile("[0-9]{1,9}")


class TokenIds:
    """A `Tokenizer` of decimal ids separated by blanks; a final eos (2) is optional."""

    kind = "ids"
    lowercase = False

    def __init__(self, vocab_sizes: tuple[int, int]):
        self.vocab_sizes = vocab_sizes

    @property
    def content(self) -> bytes:
        return repr(self.vocab_sizes).encode()

    def encode(self, sentences: Sequence[str], side: SideName = "source") -> list[list[int]]:
        """Ids of each sentence, eos at the end; `UserError` if a word is not an id."""
        size = self.vocab_sizes[0 if side == "source" else 1]
        return [_parse(sentence, size) for sentence in sentences]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join(str(int(i)) for i in x if i not in (PAD_ID, EOS_ID)) for x in ids]

    def word_borders(self, side: SideName) -> None:
        """Unknown."""

    def pieces(self, ids: Sequence[int], side: SideName) -> list[str]:
        return ["" if i in (PAD_ID, EOS_ID) else f" {int(i)}" for i in ids]

    @classmethod
    def load(cls, folder: Path, info: dict[str, Any]) -> "TokenIds":
        """Reads the folder that `make` wrote."""
        sizes = info.get("vocab_sizes")
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise UserError(f"{folder / INFO}: vocab_sizes must be two numbers of ids")
        return cls((int(sizes[0]), int(sizes[1])))


def make(vocab_sizes: tuple[int, int], folder: Path):
    """Writes the folder of a tokenizer with these numbers of source and target ids."""
    info = {"kind": TokenIds.kind, "vocab_sizes": list(vocab_sizes)}
    write_folder(folder, info, lambda path: None)


def _parse(sentence: str, size: int) -> list[int]:
    ids = []
    for word in sentence.split():
        number = int(word) if _NUMBER.fullmatch(word) else size
        if number >= size or number == PAD_ID:
            raise UserError(
                f"{word[:40]!r} is not a token id; this model is run on ids: 0 to {size - 1} "
                f"except the pad {PAD_ID}, separated by blanks"
            )
        ids.append(number)
    if ids and ids[-1] == EOS_ID:
        ids.pop()
    return [*ids, EOS_ID]
