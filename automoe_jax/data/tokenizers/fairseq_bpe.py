"""The text processing of published fairseq models: Moses tokens, BPE merges, dict.txt.

As in the preprocess.sh of HAT and AutoMoE: the Moses tokenizer with escaping; compounds split at
dashes (`-a`) for WMT'14 En-Fr and WMT'19, but not for WMT'14 En-De and IWSLT; lower case for IWSLT;
subword-nmt with "@@ "; and fairseq's dictionary, whose first four ids are bos, pad, eos and unk.
A dictionary that contains "@-@" tells that compounds were split.
"""

import contextlib
import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sacremoses import MosesDetokenizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE

from automoe_jax.architecture.ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from automoe_jax.data.tokenizers.base import INFO, SideName, WordBorders, write_folder
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

_CODES = "bpe.codes"
_SEPARATOR = "@@ "
_BLANKS = re.compile(r"\s+")
UNKNOWN = "<unk>"
DASH = "@-@"  # Moses's token for a dash at which it split a compound


class Dictionary:
    """fairseq's dict.txt: a symbol and its count on each line, with ids from 4 on."""

    def __init__(self, symbols: Sequence[str]):
        self.symbols = ("<s>", "<pad>", "</s>", UNKNOWN, *symbols)
        # As in fairseq, the last of equal symbols wins.
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, pieces: Sequence[str]) -> list[int]:
        """Ids of symbols, unk for those that are missing, eos at the end."""
        return [*(self._ids.get(piece, UNK_ID) for piece in pieces), EOS_ID]

    @classmethod
    def load(cls, path: Path) -> "Dictionary":
        """Reads a file; `UserError` naming the line that is not a symbol and a count."""
        symbols = []
        # Symbols may contain Unicode line separators: only a line feed ends a line.
        text = files.read_text(path, "dictionary").removeprefix("\ufeff")
        for i, line in enumerate(files.lines(text), start=1):
            symbol, blank, count = line.rstrip("\r").rpartition(" ")
            if not blank or not symbol or not count.isdecimal():
                raise UserError(
                    f"dictionary {path} line {i} is {line[:60]!r}; fairseq's dict.txt has a "
                    "symbol, a blank and a count on each line"
                )
            symbols.append(symbol)
        if not symbols:
            raise UserError(f"dictionary {path} is empty")
        return cls(symbols)


class FairseqBpe:
    """A `Tokenizer` of a published model, with dictionaries and Moses's rules of both languages.

    `content` is the bytes of the files; `splits_dashes` is True if compounds are split at dashes.
    """

    kind = "bpe"

    def __init__(
        self,
        bpe: BPE,
        dictionaries: tuple[Dictionary, Dictionary],
        languages: tuple[str, str],
        content: bytes,
        *,
        lowercase: bool,
    ):
        self._bpe = bpe
        self._dictionaries = dictionaries
        self.splits_dashes = any(DASH in dictionary.symbols for dictionary in dictionaries)
        self._moses = tuple(MosesTokenizer(language) for language in languages)
        self._detokenizer = MosesDetokenizer(languages[1])
        self.lowercase = lowercase
        self.content = content

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        source, target = self._dictionaries
        return len(source), len(target)

    def encode(self, sentences: Sequence[str], side: SideName = "source") -> list[list[int]]:
        which = 0 if side == "source" else 1
        return [
            self._dictionaries[which].encode(self._pieces(sentence, which))
            for sentence in sentences
        ]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self._detokenizer.detokenize(text.split()) for text in self.tokenized(ids)]

    def word_borders(self, side: SideName) -> WordBorders:
        symbols = self._dictionaries[0 if side == "source" else 1].symbols
        ends_V = np.array([not symbol.endswith(_SEPARATOR.strip()) for symbol in symbols])
        return ends_V, np.zeros_like(ends_V)

    def pieces(self, ids: Sequence[int], side: SideName) -> list[str]:
        symbols = self._dictionaries[0 if side == "source" else 1].symbols
        found, blank = [], " "
        for i in map(int, ids):
            if i in (BOS_ID, PAD_ID, EOS_ID):
                found.append("")
                continue
            symbol = UNKNOWN if i == UNK_ID else symbols[i]
            piece = symbol.removesuffix(_SEPARATOR.strip())
            found.append(blank + piece)
            blank = " " if piece == symbol else ""
        return found

    def tokenized(self, ids: Sequence[Sequence[int]], unknown: str = UNKNOWN) -> list[str]:
        """Target words of each, separated by blanks: BPE merged, but not detokenised.

        fairseq's scorer writes unknown symbols of references as "<<unk>>", which never matches.
        """
        return [self._merged(x, unknown) for x in ids]

    def _pieces(self, sentence: str, which: int) -> list[str]:
        tokens = self._moses[which].tokenize(sentence, aggressive_dash_splits=self.splits_dashes)
        text = " ".join(tokens)
        if self.lowercase:
            text = text.lower()
        text = _BLANKS.sub(" ", text).strip()
        return str(self._bpe.segment(text)).split(" ") if text else []

    def _merged(self, ids: Sequence[int], unknown: str) -> str:
        symbols = self._dictionaries[1].symbols
        special = (BOS_ID, PAD_ID, EOS_ID)
        pieces = [unknown if i == UNK_ID else symbols[int(i)] for i in ids if i not in special]
        return (" ".join(pieces) + " ").replace(_SEPARATOR, "").rstrip()

    @classmethod
    def load(cls, folder: Path, info: dict[str, Any]) -> "FairseqBpe":
        """Reads the folder that `make` wrote."""
        try:
            names, languages = list(info["dictionaries"]), tuple(info["languages"])
            lowercase = bool(info["lowercase"])
        except (KeyError, TypeError):
            fault = f"{folder / INFO} must have dictionaries, languages and lowercase"
            raise UserError(fault) from None
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise UserError(f"{folder / INFO}: dictionaries is {names}; name files of the folder")
        found = [Dictionary.load(folder / name) for name in names]
        content = b"\0".join((folder / name).read_bytes() for name in (*names, _CODES))
        content += repr((languages, lowercase)).encode()
        codes = _read_codes(folder / _CODES)
        return cls(codes, (found[0], found[-1]), languages, content, lowercase=lowercase)


def make(
    dictionaries: Sequence[Path],
    codes: Path,
    languages: tuple[str, str],
    folder: Path,
    *,
    lowercase: bool,
):
    """Copies a published model's files to a tokenizer's folder; `UserError` if one is malformed.

    Takes one dictionary, or source and target; `codes` are merges of subword-nmt's learn_bpe.
    """
    names = ["dict.txt"] if len(dictionaries) == 1 else ["dict.source.txt", "dict.target.txt"]
    for path in dictionaries:
        Dictionary.load(path)
    _read_codes(codes)

    def fill(temporary: Path):
        for path, name in zip((*dictionaries, codes), (*names, _CODES), strict=True):
            shutil.copyfile(path, temporary / name)

    info = {"dictionaries": names, "languages": list(languages), "lowercase": lowercase}
    write_folder(folder, {"kind": FairseqBpe.kind, **info}, fill)


def _read_codes(path: Path) -> BPE:
    text = files.read_text(path, "BPE codes").removeprefix("\ufeff")
    second = [line.split(" ")[-1] for line in files.lines(text) if line]
    if not second or all(word.isdecimal() for word in second):
        what = "is empty" if not second else "has a count on each line, as a dictionary has"
        raise UserError(f"BPE codes {path} {what}; give the merges of subword-nmt's learn_bpe")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return BPE(io.StringIO(text))
    except (SystemExit, ValueError):  # the library prints the reason and exits
        reason = " ".join(said.getvalue().split()) or "not a file of subword-nmt's learn_bpe"
        raise UserError(f"BPE codes {path} cannot be read: {reason}") from None
