"""Architectures of Transformer-Big's size: to export, time and train those of configs/subnets.

python launch/export.py --config configs/transformer_big.py --random_weights \\
    --subnet=configs/subnets/switch_big_every_layer.json --out=timing
python launch/benchmark.py --export=timing

The space holds Transformer-Big and the Switch-Big variants (1 to 3 experts a layer), on WMT'14
English-German.
"""

from automoe_jax.config import base


def get_config():
    config = base()
    config.data.kind = "tfds"
    config.data.name = "wmt14_translate/de-en"
    config.data.max_length = 175
    space = config.space
    space.qkv_dim = 1024
    space.encoder_embed_dims = space.decoder_embed_dims = (1024,)
    space.encoder_depths = space.decoder_depths = (6,)
    space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (16,)
    space.cross_spans = (1,)
    space.encoder_experts = space.decoder_experts = (1, 2, 3)
    space.encoder_ffn_dims = space.decoder_ffn_dims = (4096,)
    space.expert_sizes = "standard"
    return config
