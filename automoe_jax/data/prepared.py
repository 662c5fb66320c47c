"""The data that training and search read."""

import dataclasses

from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.data.tokens import TokenPairs


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A tokenizer, and the training and validation pairs it encoded."""

    tokenizer: Tokenizer
    train: TokenPairs
    valid: TokenPairs
