"""The interface of tokenizers, and how their folders are written.

A tokenizer is a folder (`tokenizer/` of a run or an export) whose `tokenizer.json` names its kind:
`sentencepiece` (one joint vocabulary, trained on the corpus), `bpe` (of a published fairseq model)
or `ids` (the text is token ids).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from automoe_jax.system import files

INFO = "tokenizer.json"
SideName = Literal["source", "target"]


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
        """Equal if two tokenizers encode alike."""
        ...

    def encode(self, sentences: Sequence[str], side: SideName = "source") -> list[list[int]]:
        """Ids of each sentence, eos at the end."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Target text of each; drops special ids, and writes a mark for unknown ones."""
        ...


def write_folder(folder: Path, info: dict, fill: Callable[[Path], object]):
    """Writes a tokenizer's folder under a temporary name and renames it.

    Args:
      folder: its final name.
      info: content of `tokenizer.json`, without the version.
      fill: writes all other files into the folder it is given.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    fill(temporary)
    files.write_json(temporary / INFO, {"version": 1, **info})
    temporary.replace(folder)
