"""The search space of HAT's or AutoMoE's supertransformer YAML, everything else as in the paper.

python launch/describe.py --config=configs/supertransformer.py:space0.yml
python launch/convert.py --config=configs/supertransformer.py:space0.yml --checkpoint=model.pt ...

What stands behind the colon is the file. Its keys for training and data have no effect: corpus and
training are fields of the config (--config.data..., --config.training...).
"""

import dataclasses

from automoe_jax import files
from automoe_jax.config import base
from automoe_jax.published import supertransformer


def get_config(path=""):
    config = base()
    if path:
        space = supertransformer.parse(files.read_text(path, "supertransformer"))
        config.space.update(dataclasses.asdict(space))
    return config
