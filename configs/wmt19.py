"""WMT'19 English-German, the paper's setting; HAT's test set (newstest2018).

python launch/train.py --config configs/wmt19.py
"""

from automoe_jax.config import base


def get_config():
    config = base()
    config.data.kind = "tfds"
    config.data.name = "wmt19_translate/de-en"
    config.data.max_length = 175
    config.search.constraint.latency_ratio = 0.5
    return config
