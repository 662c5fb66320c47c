"""WMT'14 English-German, the paper's setting.

python launch/train.py --config configs/wmt14.py
python launch/train.py --config configs/wmt14.py --dry_run

The paper trains for 40,000 steps of 128 x 4,096 tokens on 16 V100 GPUs (section 4.1). It draws one
subnet per update and gives the routers no loss of their own: --config.sampling.unit=update
--config.training.load_balance=0 do the same; ours draws one per micro-batch and device, and
balances. For French: --config.data.name=wmt14_translate/fr-en --config.data.target_lang=fr.
"""

from automoe_jax.config import base


def get_config():
    config = base()
    config.data.kind = "tfds"
    config.data.name = "wmt14_translate/de-en"
    config.data.max_length = 175
    config.search.constraint.latency_ratio = 0.5
    return config
