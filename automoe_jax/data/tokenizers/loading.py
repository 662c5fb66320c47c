"""Reads and copies the folder of a tokenizer, whatever its kind."""

import shutil
from pathlib import Path

from automoe_jax.data.tokenizers.base import INFO, Tokenizer, write_folder
from automoe_jax.data.tokenizers.config import KINDS, TokenizerConfig
from automoe_jax.system import files
from automoe_jax.system.errors import UserError


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
