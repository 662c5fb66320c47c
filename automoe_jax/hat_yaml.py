"""Reads HAT's subtransformer YAML (github.com/mit-han-lab/hardware-aware-transformers)."""

from typing import Any

import yaml

from automoe_jax.subnet import Decoder, DecoderLayer, Encoder, EncoderLayer, Subnet, SubnetError

# How HAT writes a cross-attention span: the number of encoder layers before the last, or -1.
SPANS = {-1: 1, 1: 2, 2: 3}

_WIDTHS = {side: f"{side}-embed-dim-subtransformer" for side in ("encoder", "decoder")}
_DEPTHS = {side: f"{side}-layer-num-subtransformer" for side in ("encoder", "decoder")}
_LISTS = {
    "encoder": {
        "heads": "encoder-self-attention-heads-all-subtransformer",
        "ffn": "encoder-ffn-embed-dim-all-subtransformer",
    },
    "decoder": {
        "self_heads": "decoder-self-attention-heads-all-subtransformer",
        "cross_heads": "decoder-ende-attention-heads-all-subtransformer",
        "span": "decoder-arbitrary-ende-attn-all-subtransformer",
        "ffn": "decoder-ffn-embed-dim-all-subtransformer",
    },
}


def parse(text: str, qkv_dim: int) -> Subnet:
    """The subnet of a subtransformer file.

    Args:
      text: the YAML. Lists may be longer than the number of layers, as in HAT's own files; the
        front entries count.
      qkv_dim: the Q/K/V width, which these files leave out.

    Raises:
      SubnetError: names the key that is missing, unknown or wrong.
    """
    try:
        obj = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise SubnetError("not YAML: " + " ".join(str(e).split())) from None
    if not isinstance(obj, dict):
        raise SubnetError("not a YAML mapping of HAT's subtransformer keys")
    known = {*_WIDTHS.values(), *_DEPTHS.values()}
    known |= {key for lists in _LISTS.values() for key in lists.values()}
    for key in sorted(map(str, obj.keys() - known)):
        raise SubnetError(f"{key} is not a key of HAT's subtransformer YAML")
    for key in sorted(known - obj.keys()):
        raise SubnetError(f"{key} is missing")

    encoder = _columns(obj, "encoder")
    decoder = _columns(obj, "decoder")
    span_key = _LISTS["decoder"]["span"]
    for span in decoder["span"]:
        if not isinstance(span, int) or span not in SPANS:
            raise SubnetError(f"{span_key} has {span!r}; allowed: -1, 1 and 2")
    return Subnet(
        qkv_dim=qkv_dim,
        encoder=Encoder(
            obj[_WIDTHS["encoder"]],
            tuple(
                EncoderLayer(heads, (ffn,))
                for heads, ffn in zip(encoder["heads"], encoder["ffn"], strict=True)
            ),
        ),
        decoder=Decoder(
            obj[_WIDTHS["decoder"]],
            tuple(
                DecoderLayer(self_heads, cross_heads, SPANS[span], (ffn,))
                for self_heads, cross_heads, span, ffn in zip(
                    decoder["self_heads"],
                    decoder["cross_heads"],
                    decoder["span"],
                    decoder["ffn"],
                    strict=True,
                )
            ),
        ),
    )


def _columns(obj: dict[str, Any], side: str) -> dict[str, list[Any]]:
    depth = obj[_DEPTHS[side]]
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise SubnetError(f"{_DEPTHS[side]} is {depth!r}; it must be a positive integer")
    columns = {}
    for name, key in _LISTS[side].items():
        values = obj[key]
        if not isinstance(values, list) or len(values) < depth:
            raise SubnetError(f"{key} is {values!r}; it must list at least {depth} value(s)")
        columns[name] = values[:depth]
    return columns
