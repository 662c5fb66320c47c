"""Text to token ids and back: the kinds of tokenizers, and what they share.

A tokenizer is a folder (`tokenizer/` of a run or an export) whose `tokenizer.json` names its kind:
`sentencepiece` (one joint vocabulary, trained on the corpus), `bpe` (what published fairseq models
were trained with) or `ids` (text that is token ids already).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from automoe_jax.system import files

INFO = "tokenizer.json"
Side = Literal["source", "target"]


class Tokenizer(Protocol):
    """Text to ids and back. Ids: bos 0, pad 1, eos 2, unk 3."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        ...

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        """Ids of source and target."""
        ...

    @property
    def content(self) -> bytes:
        """Equal for tokenizers that give equal ids."""
        ...

    def encode(self, sentences: Sequence[str], side: Side = "source") -> list[list[int]]:
        """Ids of each sentence, eos at the end."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Target text of each; special ids are left out, unknown ones become a mark."""
        ...


def write_folder(folder: Path, info: dict, fill: Callable[[Path], object]):
    """Makes a tokenizer's folder beside its name and renames it.

    Args:
      folder: where.
      info: what `tokenizer.json` says, besides the version.
      fill: writes the other files into the folder that it is given.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    fill(temporary)
    files.write_json(temporary / INFO, {"version": 1, **info})
    temporary.replace(folder)
