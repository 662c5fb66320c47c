"""The module of one architecture on its own, by what its layers are."""

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.model.evolved import EvolvedTransformer
from automoe_jax.model.scales import Scales
from automoe_jax.model.transformer import Transformer

StandAlone = Transformer | EvolvedTransformer


def stand_alone(
    arch: Subnet,
    vocab_sizes: tuple[int, int],
    base_dims: tuple[int, int],
    *,
    share_embeddings: str,
    scales: Scales,
    dropouts: tuple[float, float] = (0.0, 0.0),
    router_jitter: float = 0.0,
    dtype: str = "float32",
    remat: bool = False,
) -> StandAlone:
    """Fields as of `Transformer`; `dropouts` are `dropout` and `attention_dropout`."""
    if arch.cell == "evolved":  # no routers, and scales of 1
        kept = share_embeddings, dtype, remat
        return EvolvedTransformer(arch, vocab_sizes, *base_dims, *dropouts, *kept)
    own = share_embeddings, scales, router_jitter, dtype, remat
    return Transformer(arch, vocab_sizes, *base_dims, *dropouts, *own)
