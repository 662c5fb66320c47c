"""Group `tokenizer` of a config: the vocabulary."""

import dataclasses

from automoe_jax.architecture.ids import UNK_ID
from automoe_jax.system import checks
from automoe_jax.system.errors import UserError

KINDS = ("sentencepiece", "bpe", "ids")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Kind and settings of the tokenizer.

    Attributes:
      kind: "sentencepiece", trained on the corpus; "bpe", from `dictionaries` and `bpe_codes`;
        "ids", for text that is token ids separated by blanks.
      vocab_size: pieces, special ones included; kind bpe takes the size of its dictionaries.
      character_coverage: share of characters that get a piece; others are unknown (sentencepiece).
      split_digits: True to make every digit a piece, which copies numbers digit by digit.
      max_sentences: most lines of both sides to train on, spread evenly (sentencepiece).
      dictionaries: fairseq's dict.txt, one for both languages, or source and target (bpe).
      bpe_codes: file of subword-nmt's merges (bpe).
      lowercase: True to lower-case all text, translations included, as the published IWSLT models
        do (sentencepiece, bpe).
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
        checks.one_of(self, "tokenizer.", kind=KINDS)
        checks.at_least(UNK_ID + 2, self, "tokenizer.", "vocab_size")
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
        elif self.dictionaries or self.bpe_codes:
            raise UserError(
                "tokenizer.dictionaries and bpe_codes are for kind bpe, but tokenizer.kind is "
                f"{self.kind}"
            )
        if self.lowercase and self.kind == "ids":
            raise UserError(
                "tokenizer.lowercase is true, but tokenizer.kind is ids: ids have no case; leave "
                "it out"
            )
