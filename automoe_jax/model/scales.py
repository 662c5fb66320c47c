"""How the outputs of a model's layers are scaled: fixed factors, and the gate of experts."""

from typing import NamedTuple

from automoe_jax.architecture.space import SearchSpace


class Scales(NamedTuple):
    """Factors on the outputs of a layer's parts, and the experts' gate, as in `SearchSpace`."""

    ffn: float = 1.0
    attention: float = 1.0
    gate: str = "probability"


def scales_of(space: SearchSpace) -> Scales:
    """The scales of a space's models."""
    return Scales(space.ffn_scale, space.attention_scale, space.gate)
