"""The systems that the paper compares, each as a search space for a corpus.

python launch/train.py --config configs/systems.py:msdocs:hat               # on a small machine
python launch/train.py --config configs/systems.py:wmt14:hat --dry_run      # at the paper's size

Behind the colon stand a config of this folder, for text, sizes and recipe, and a system:

  automoe           experts of any number and size of the corpus's config
  automoe_standard  one size for all experts of a layer
  hat               one FFN in each layer (dense)
  experts_2, _4, _6, _16    the largest number of experts of a layer
  elastic_encoder, fixed_encoder    encoders of all depths; of the largest alone
  placement_121212, _111222, _222111    the number of experts of each layer, the same in both stacks
                    from their first layers on (six encoder layers)
  identity          experts of the largest size or none: FFNs of 0
  random            automoe, searched by drawing at random as many subnets
  by_hand           holds the architectures of configs/systems/*.json, which are not searched
  evolved           holds mini_evolved.json, or configs/subnets/evolved_base.json at full size

Transformers and mixtures made by hand are subnet files: of the scaled-down sizes in
configs/systems/ (mini_...), at full size in configs/subnets/.
"""

import runpy
from pathlib import Path

from automoe_jax.system.errors import UserError

CORPORA = ("msdocs", "multi30k", "quickstart", "wmt14", "wmt19")
_POWERS = (1, 2, 4, 8, 16)
_SCALED_DOWN = 128  # the width that the architectures of configs/systems/*.json have


def _hat(space):
    space.encoder_experts = space.decoder_experts = (1,)


def _automoe(space):
    space.expert_sizes = "fractional"


def _standard(space):
    space.expert_sizes = "standard"


def _experts(largest: int):
    def change(space):
        numbers = tuple(n for n in _POWERS if n < largest)
        space.encoder_experts = space.decoder_experts = (*numbers, largest)

    return change


def _elastic_encoder(space):
    space.encoder_depths = tuple(range(max(space.cross_spans), max(space.encoder_depths) + 1))


def _fixed_encoder(space):
    space.encoder_depths = (max(space.encoder_depths),)


def _placement(*numbers: int):
    def change(space):
        space.encoder_depths = (len(numbers),)
        space.encoder_placement = numbers
        space.decoder_placement = numbers[: max(space.decoder_depths)]
        space.encoder_experts = space.decoder_experts = tuple(sorted(set(numbers)))

    return change


def _identity(space):
    space.identity_experts = True
    space.encoder_ffn_dims = (max(space.encoder_ffn_dims),)
    space.decoder_ffn_dims = (max(space.decoder_ffn_dims),)


def _by_hand(space):
    space.encoder_depths, space.decoder_depths = (*range(1, 7), 12), tuple(range(1, 7))
    space.encoder_experts = space.decoder_experts = (1, 2, 3, 4, 5, 6)
    space.cross_spans = (1,)
    if space.qkv_dim == _SCALED_DOWN:
        space.encoder_embed_dims, space.decoder_embed_dims = (128,), (128, 192)
        space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (4,)
        space.encoder_ffn_dims = space.decoder_ffn_dims = (256, 512, 1024)


def _evolved(space):
    _by_hand(space)
    space.cell = "evolved"
    space.encoder_experts = space.decoder_experts = (1,)
    space.ffn_scale = space.attention_scale = 1.0  # these cells are normalised first
    if space.qkv_dim != _SCALED_DOWN:
        space.encoder_embed_dims = space.decoder_embed_dims = (512,)
        space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (8,)
        space.encoder_ffn_dims = space.decoder_ffn_dims = (2048,)


SYSTEMS = {
    "automoe": _automoe,
    "automoe_standard": _standard,
    "hat": _hat,
    **{f"experts_{n}": _experts(n) for n in (2, 4, 6, 16)},
    "elastic_encoder": _elastic_encoder,
    "fixed_encoder": _fixed_encoder,
    "placement_121212": _placement(1, 2, 1, 2, 1, 2),
    "placement_111222": _placement(1, 1, 1, 2, 2, 2),
    "placement_222111": _placement(2, 2, 2, 1, 1, 1),
    "identity": _identity,
    "random": _automoe,
    "by_hand": _by_hand,
    "evolved": _evolved,
}


def get_config(name=""):
    corpus, _, system = name.partition(":")
    if corpus not in CORPORA or system not in SYSTEMS:
        raise UserError(
            f"configs/systems.py:{name} is not a corpus and a system; give "
            f"configs/systems.py:CORPUS:SYSTEM with {', '.join(CORPORA)} and {', '.join(SYSTEMS)}"
        )
    config = runpy.run_path(str(Path(__file__).with_name(f"{corpus}.py")))["get_config"]()
    SYSTEMS[system](config.space)
    if system == "random":
        config.search.algorithm = "random_search"
    return config
