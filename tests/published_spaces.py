"""The search spaces of the supernets in `../shared/fixtures`."""

import dataclasses

from automoe_jax.architecture.space import SearchSpace

SPACE = SearchSpace(
    qkv_dim=32,
    encoder_embed_dims=(16, 32),
    decoder_embed_dims=(16, 32),
    encoder_depths=(3,),
    decoder_depths=(1, 2, 3),
    encoder_heads=(2, 4),
    decoder_self_heads=(2, 4),
    decoder_cross_heads=(2, 4),
    encoder_experts=(1, 2, 3),
    decoder_experts=(1, 2, 3),
    encoder_ffn_dims=(16, 32, 64),
    decoder_ffn_dims=(16, 32, 64),
    identity_experts=True,
    encoder_top_k=(1, 2),
    decoder_top_k=(1, 2),
)


SPACES = {
    "superA": SPACE,
    "superB": dataclasses.replace(
        SPACE,
        encoder_depths=(2,),
        encoder_experts=(1,),
        decoder_experts=(1,),
        cross_spans=(1, 2),
        identity_experts=False,
        encoder_top_k=(1,),
        decoder_top_k=(1,),
    ),
}
