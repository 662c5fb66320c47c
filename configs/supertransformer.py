"""The search space of HAT's or AutoMoE's supertransformer YAML, everything else as in the paper.

python launch/describe.py --config=configs/supertransformer.py:space0.yml
python launch/convert.py --config=configs/supertransformer.py:space0.yml --checkpoint=model.pt ...

What stands behind the colon is the file. Its languages become those of the config; its other keys
for training and data have no effect: --config.training... and --config.data.kind=parallel_text
--config.data.path=DIR (or kind tfds, see wmt14.py) say that here.
"""

import dataclasses

from automoe_jax.architecture.space import SpaceError
from automoe_jax.config import base
from automoe_jax.published import supertransformer
from automoe_jax.system import files
from automoe_jax.system.errors import UserError


def get_config(path=""):
    if not path:
        raise UserError("name the YAML file behind a colon: configs/supertransformer.py:space0.yml")
    config = base()
    text = files.read_text(path, "supertransformer")
    try:
        config.space.update(dataclasses.asdict(supertransformer.parse(text)))
    except SpaceError as e:
        raise SpaceError(f"supertransformer file {path}: {e}") from None
    config.data.update(supertransformer.languages(text))
    return config
