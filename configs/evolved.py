"""The Evolved Transformer (So et al. 2019) on WMT'14 English-German, in two sizes.

python launch/train.py --config configs/evolved.py --subnet=configs/subnets/evolved_base.json
python launch/train.py --config configs/evolved.py:big --subnet=configs/subnets/evolved_big.json

Behind the colon stands base, the default, or big. How long it trains, and at what rate, is in group
subnet_training.
"""

from automoe_jax.config import base
from automoe_jax.system.errors import UserError

# Width, and heads of attention.
SIZES = {"base": (512, 8), "big": (1024, 16)}


def get_config(size="base"):
    if size not in SIZES:
        raise UserError(f"configs/evolved.py:{size} is no size; give one of {', '.join(SIZES)}")
    width, heads = SIZES[size]
    config = base()
    config.data.kind = "tfds"
    config.data.name = "wmt14_translate/de-en"
    config.data.max_length = 175
    space = config.space
    space.cell = "evolved"
    space.qkv_dim = width
    space.encoder_embed_dims = space.decoder_embed_dims = (width,)
    space.encoder_depths, space.decoder_depths = (3,), (4,)
    space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (heads,)
    space.cross_spans = space.encoder_experts = space.decoder_experts = (1,)
    space.encoder_ffn_dims = space.decoder_ffn_dims = (4 * width,)
    return config
