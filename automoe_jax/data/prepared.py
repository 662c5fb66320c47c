"""What training and search read of a corpus."""

import dataclasses

from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.data.tokens import TokenPairs


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """What training and search read."""

    tokenizer: Tokenizer
    train: TokenPairs
    valid: TokenPairs
