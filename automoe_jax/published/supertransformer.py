"""HAT's and AutoMoE's supertransformer YAML: a search space.

Sources: configs/*/supertransformer of github.com/mit-han-lab/hardware-aware-transformers and of
github.com/microsoft/AutoMoE. Their keys for training and data have no effect here.
"""

from typing import Any

import yaml

from automoe_jax.architecture.space import SearchSpace, SpaceError
from automoe_jax.architecture.stack_space import StackSpace
from automoe_jax.architecture.subnet import STACKS
from automoe_jax.published.options import WRITTEN_SPANS, Options, read, write

# The key of each field of the space.
_BOTH = {"embed_dims": "embed", "ffn_dims": "ffn-embed-dim", "depths": "layer-num"}
_CHOICES = {
    **{f"{x}_{name}": f"{x}-{key}-choice" for name, key in _BOTH.items() for x in STACKS},
    "encoder_heads": "encoder-self-attention-heads-choice",
    "decoder_self_heads": "decoder-self-attention-heads-choice",
    "decoder_cross_heads": "decoder-ende-attention-heads-choice",
}
_SPANS = "decoder-arbitrary-ende-attn-choice"
# Sizes of the supernet itself, and the choices whose largest entry they must equal.
_SUPER = {"embed-dim": "embed_dims", "ffn-embed-dim": "ffn_dims", "layers": "depths"}
_EXPERTS = {"experts": "n-experts", "top_k": "num-experts-to-route",
            "placement": "expert-all-fixed-num-experts"}  # fmt: skip
# The published search draws these options when their list has two entries.
_IDENTITY, _FRACTIONAL = "std-vs-dummy-experts", "each-expert-ffn-dim"
_DROPS = ("drop-mha-sublayer", "drop-ffn-sublayer")
_SHARED = {"all": "share-all-embeddings", "decoder": "share-decoder-input-output-embed"}
_NAMES = (*_SUPER, *_EXPERTS.values(), _IDENTITY, _FRACTIONAL, *_DROPS)
_KNOWN = {*_CHOICES.values(), *_SHARED.values(), _SPANS, "qkv-dim"}
_KNOWN |= {f"{side}-{name}" for side in STACKS for name in _NAMES}


def parse(text: str) -> SearchSpace:
    """The search space of a supertransformer file; `SpaceError` names a missing or wrong key.

    Without expert keys every layer is dense. `std-vs-dummy-experts: [0, 1]` gives identity experts:
    anywhere in a layer with experts of different sizes, where the published code has them first.
    """
    options = read(text, _KNOWN, "supertransformer", SpaceError)
    fields: dict[str, Any] = {name: options.integers(key) for name, key in _CHOICES.items()}
    for name, key in _CHOICES.items():
        if min(fields[name]) < 1:
            raise SpaceError(f"{key} has {min(fields[name])}; positive integers are allowed")
    spans = options.spans(_SPANS)
    for side in STACKS:
        for name, field in _SUPER.items():
            largest = max(fields[f"{side}_{field}"])
            size = options.integer(f"{side}-{name}", largest)
            if size != largest:
                raise SpaceError(
                    f"{side}-{name} is {size}, but the largest choice is {largest}; a supernet "
                    "here is as large as its largest choice"
                )
        for field, name in _EXPERTS.items():
            default = () if field == "placement" else (1,)
            fields[f"{side}_{field}"] = options.integers(f"{side}-{name}", default)
        for name in _DROPS:
            if 0 in options.integers(f"{side}-{name}", (1,)):
                raise SpaceError(
                    f"{side}-{name} drops sublayers (0): this project has no such architectures"
                )
    shared = next((value for value, key in _SHARED.items() if options.flag(key)), "none")
    return SearchSpace(
        qkv_dim=options.integer("qkv-dim", max(fields["encoder_embed_dims"])),
        cross_spans=spans,
        share_embeddings=shared,
        identity_experts=_drawn(options, _IDENTITY) is True,
        expert_sizes="standard" if _drawn(options, _FRACTIONAL) is False else "fractional",
        **fields,
    )


def _drawn(options: Options, name: str) -> bool | None:
    """True if the published search draws the option; None for dense stacks, without expert keys."""
    found = set()
    for side in STACKS:
        if options.given(f"{side}-n-experts"):
            given = options.integers(f"{side}-{name}", (1,))
            if not set(given) <= {0, 1}:
                raise SpaceError(f"{side}-{name} is {list(given)}; allowed: 0 and 1")
            found.add(len(given) > 1)
    if len(found) > 1:
        raise SpaceError(f"encoder-{name} and decoder-{name} differ; a space here has one for both")
    return found.pop() if found else None


def languages(text: str) -> dict[str, str]:
    """The languages of a file, as fields of a config's `data`."""
    values = yaml.load(text, Loader=yaml.BaseLoader)
    keys = {"source_lang": "source-lang", "target_lang": "target-lang"}
    return {field: values[key] for field, key in keys.items() if key in values}


def dump(space: SearchSpace) -> str:
    """The supertransformer file of a space.

    Raises `SpaceError` for a cross-attention span above 3, or evolved cells.
    """
    if space.cell == "evolved":
        raise SpaceError("space.cell is evolved; a supertransformer file holds Transformers")
    for span in space.cross_spans:
        if span not in WRITTEN_SPANS:
            raise SpaceError(
                f"space.cross_spans has {span}; a supertransformer file has spans up to 3"
            )
    sizes = [
        (f"{stack.side}-{name}", max(getattr(stack, field)))
        for name, field in _SUPER.items()
        for stack in space.stacks
    ]
    heads = [(f"{x.side}-attention-heads", max(map(max, x.heads.values()))) for x in space.stacks]
    spans = tuple(WRITTEN_SPANS[span] for span in space.cross_spans)
    moe = space.identity_experts or max(stack.max_experts for stack in space.stacks) > 1
    return write([
        [(key, True) for value, key in _SHARED.items() if value == space.share_embeddings],
        [*sizes, *heads, ("qkv-dim", space.qkv_dim)],
        # Largest first, as theirs.
        [*((key, getattr(space, name)[::-1]) for name, key in _CHOICES.items()), (_SPANS, spans)],
        *(_written_experts(stack) for stack in space.stacks if moe),
    ])  # fmt: skip


def _written_experts(stack: StackSpace) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = [
        *((name, getattr(stack, field)) for field, name in _EXPERTS.items()),
        (_IDENTITY, (0, 1) if stack.identity_experts else (1,)),
        (_FRACTIONAL, (0, 1) if stack.expert_sizes == "fractional" else (1,)),
    ]
    return [(f"{stack.side}-{name}", value) for name, value in lines if value]
