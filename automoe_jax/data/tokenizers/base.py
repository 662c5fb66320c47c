"""Text to token ids and back: the kinds of tokenizers, and what they share.

A tokenizer is a folder (`tokenizer/` of a run or an export) whose `tokenizer.json` names its kind:
`sentencepiece` (one joint vocabulary, trained on the corpus), `bpe` (what published fairseq models
were trained with) or `ids` (text that is token ids already).
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from automoe_jax.architecture.ids import UNK_ID
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

INFO = "tokenizer.json"
KINDS = ("sentencepiece", "bpe", "ids")
Side = Literal["source", "target"]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Group `tokenizer` of a config.

    Attributes:
      kind: "sentencepiece", trained on the corpus; "bpe", from `dictionaries` and `bpe_codes`;
        "ids", for text that is token ids separated by blanks.
      vocab_size: pieces, special ones included; bpe has what its dictionaries have.
      character_coverage: share of characters that get a piece; the rest is unknown (sentencepiece).
      split_digits: every digit its own piece, so that numbers are copied digit by digit
        (sentencepiece).
      max_sentences: most lines (source and target) to train on, spread evenly over the corpus
        (sentencepiece).
      dictionaries: fairseq's dict.txt, one for both languages or source and target (bpe).
      bpe_codes: merges that subword-nmt learned (bpe).
      lowercase: text to lower case, as the IWSLT models want it (bpe).
    """

    kind: str = "sentencepiece"
    vocab_size: int = 32_768
    character_coverage: float = 1.0
    split_digits: bool = False
    max_sentences: int = 4_000_000
    dictionaries: tuple[str, ...] = ()
    bpe_codes: str = ""
    lowercase: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"tokenizer.kind is {self.kind!r}; allowed: {', '.join(KINDS)}")
        if self.vocab_size <= UNK_ID + 1:
            raise UserError(f"tokenizer.vocab_size is {self.vocab_size}; at least 5 is needed")
        if not 0.98 <= self.character_coverage <= 1:
            raise UserError(
                f"tokenizer.character_coverage is {self.character_coverage}; allowed: 0.98 to 1"
            )
        if self.kind == "bpe":
            if len(self.dictionaries) not in (1, 2):
                raise UserError(
                    f"tokenizer.dictionaries has {len(self.dictionaries)} files; kind bpe needs "
                    "one dict.txt for both languages, or one for the source and one for the target"
                )
            if not self.bpe_codes:
                raise UserError("tokenizer.bpe_codes is empty; kind bpe needs the file of merges")
        elif self.dictionaries or self.bpe_codes or self.lowercase:
            raise UserError(
                "tokenizer.dictionaries, bpe_codes and lowercase are for kind bpe, but "
                f"tokenizer.kind is {self.kind}"
            )


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


def load(folder: Path) -> Tokenizer:
    """Reads a tokenizer's folder; `UserError` where something is missing or broken."""
    info = files.read_json(folder / INFO, "tokenizer")
    kind = info.get("kind") if isinstance(info, dict) else None
    # Each brings a library of its own: only the one that is needed is imported.
    if kind == "sentencepiece":
        from automoe_jax.data.tokenizers.sentence_piece import SentencePiece  # noqa: PLC0415

        return SentencePiece.load(folder)
    if kind == "bpe":
        from automoe_jax.data.tokenizers.fairseq_bpe import FairseqBpe  # noqa: PLC0415

        return FairseqBpe.load(folder, info)
    if kind == "ids":
        from automoe_jax.data.tokenizers.token_ids import TokenIds  # noqa: PLC0415

        return TokenIds.load(folder, info)
    raise UserError(f"{folder / INFO} is not a tokenizer; its kind must be {', '.join(KINDS)}")


def vocab_sizes(config: TokenizerConfig) -> tuple[int, int]:
    """Ids of source and target that a tokenizer of this config has, before it is made."""
    if config.kind == "bpe":
        from automoe_jax.data.tokenizers.fairseq_bpe import Dictionary  # noqa: PLC0415

        sizes = [len(Dictionary.load(files.expanded(path))) for path in config.dictionaries]
        return sizes[0], sizes[-1]
    return config.vocab_size, config.vocab_size


def copy(source: Path, folder: Path):
    """Copies a tokenizer's folder, beside its name and then renamed."""
    write_folder(
        folder,
        files.read_json(source / INFO, "tokenizer"),
        lambda temporary: shutil.copytree(source, temporary, dirs_exist_ok=True),
    )


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
