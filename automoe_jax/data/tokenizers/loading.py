"""Reads and copies the folder of a tokenizer of any kind."""

import shutil
from pathlib import Path

from automoe_jax.data.tokenizers.base import INFO, Tokenizer, write_folder
from automoe_jax.data.tokenizers.config import KINDS, TokenizerConfig
from automoe_jax.data.tokenizers.sentence_piece import SentencePiece
from automoe_jax.data.tokenizers.token_ids import TokenIds
from automoe_jax.system import files
from automoe_jax.system.errors import UserError


def load(folder: Path) -> Tokenizer:
    """Reads a tokenizer's folder; `UserError` if something is missing or broken."""
    info = files.read_json(folder / INFO, "tokenizer")
    kind = info.get("kind") if isinstance(info, dict) else None
    if kind == "sentencepiece":
        return SentencePiece.load(folder, info)
    if kind == "bpe":
        return _fairseq_bpe().FairseqBpe.load(folder, info)
    if kind == "ids":
        return TokenIds.load(folder, info)
    raise UserError(f"{folder / INFO} is not a tokenizer; its kind must be {', '.join(KINDS)}")


def vocab_sizes(config: TokenizerConfig) -> tuple[int, int]:
    """Source and target vocabulary sizes of a config, before its tokenizer is made."""
    if config.kind == "bpe":
        load_dictionary = _fairseq_bpe().Dictionary.load
        sizes = [len(load_dictionary(files.expanded(path))) for path in config.dictionaries]
        return sizes[0], sizes[-1]
    return config.vocab_size, config.vocab_size


def copy(source: Path, folder: Path):
    """Copies a tokenizer's folder."""
    info = files.read_json(source / INFO, "tokenizer")
    write_folder(folder, info, lambda own: shutil.copytree(source, own, dirs_exist_ok=True))


def _fairseq_bpe():
    # Saves the other kinds 0.3 s of start-up (sacremoses).
    from automoe_jax.data.tokenizers import fairseq_bpe  # noqa: PLC0415

    return fairseq_bpe
