"""What the cells of the Evolved Transformer consist of, by which they are counted and exported.

Linear maps of the same input are joined into one. A separable convolution is one of each channel by
itself, (positions, channels), before a linear map of its name.
"""

from typing import NamedTuple

from automoe_jax.architecture.subnet import DecoderLayer, LayerSpec

# Positions that convolutions see.
NARROW = 3  # in the encoder
DEPTHWISE = {"encoder": {"joined": 9}, "decoder": {"wide": 11, "narrow": 7, "joined": 7}}


class CellLayout(NamedTuple):
    maps: dict[str, tuple[int, int]]  # inputs, outputs
    depthwise: dict[str, tuple[int, int]]  # positions, channels
    norms: dict[str, int]


def cell_layout(layer: LayerSpec, dim: int, encoder_dim: int, qkv_dim: int) -> CellLayout:
    """Names and sizes of the arrays of a cell of width `dim`."""
    (ffn,) = layer.experts
    maps = {"qkv": (dim, 3 * qkv_dim), "self_out": (qkv_dim, dim)}
    maps |= {"fc1": (dim, ffn), "fc2": (ffn, dim)}
    norms = dict.fromkeys(("branches_norm", "self_attention_norm", "ffn_norm"), dim)
    if not isinstance(layer, DecoderLayer):
        maps |= {"gated": (dim, 2 * dim), "wide": (dim, 4 * dim)}
        maps |= {"narrow": (NARROW * dim, dim // 2), "joined": (4 * dim, dim // 2)}
        norms |= {"gated_norm": dim, "joined_norm": 4 * dim}
        return CellLayout(maps, _depthwise("encoder", {"joined": 4 * dim}), norms)
    attention = {"cross_q": (dim, qkv_dim), "cross_kv": (encoder_dim, 2 * qkv_dim)}
    attention |= {"cross_out": (qkv_dim, dim)}
    maps |= attention | {f"first_{name}": shape for name, shape in attention.items()}
    maps |= {"first_qkv": maps["qkv"], "first_self_out": maps["self_out"]}
    channels = {"wide": dim, "narrow": dim, "joined": 2 * dim}
    outputs = {"wide": 2 * dim, "narrow": dim // 2, "joined": dim}
    maps |= {name: (channels[name], outputs[name]) for name in channels}
    norms |= {"first_norm": dim, "cross_attention_norm": dim, "joined_norm": 2 * dim}
    return CellLayout(maps, _depthwise("decoder", channels), norms)


def _depthwise(side: str, channels: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (width, channels[name]) for name, width in DEPTHWISE[side].items()}
