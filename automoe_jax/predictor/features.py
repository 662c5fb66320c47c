"""Additive features of the latency of an exported subnet.

`work` follows the translator: the encoder runs once, cross-attention keys and values are computed
once, and each of `target_length` decoder steps reads the weights of its layers and of the output
layer. Features are millions of multiply-adds, millions of weights read, or counts, so a coefficient
is in ms per million or per unit. `averages` are the ten features of HAT's tables.
"""

import dataclasses
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet

WORK = (
    "constant",
    "encoder layers", "encoder attention", "encoder heads",
    "encoder experts", "encoder expert weights", "encoder expert calls",
    "cross-attention set-up",
    "decoder layers", "decoder attention", "decoder heads", "cross-attention span",
    "decoder expert", "decoder expert weights", "decoder expert calls", "decoder routers",
    "output layer", "beyond the cache",
)  # fmt: skip

# HAT's names of what `averages` holds, in its order.
AVERAGES = (
    "encoder_embed_dim", "encoder_layer_num",
    "encoder_ffn_embed_dim_avg", "encoder_self_attention_heads_avg",
    "decoder_embed_dim", "decoder_layer_num",
    "decoder_ffn_embed_dim_avg", "decoder_self_attention_heads_avg",
    "decoder_ende_attention_heads_avg", "decoder_arbitrary_ende_attn_avg",
)  # fmt: skip
# Of `products`.
PRODUCTS = (
    *AVERAGES,
    "decoder layers x width", "decoder layers x FFN size", "decoder layers x FFN size x width",
    "decoder layers x self-attention heads", "decoder layers x cross-attention heads",
    "decoder layers x span", "decoder layers x span x encoder width",
    "encoder layers x FFN size x width", "encoder layers x heads",
    "decoder layers x width x width",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TranslationTask:
    """The translation task that latencies are measured on; lengths are in tokens."""

    source_length: int
    target_length: int
    beam_size: int
    vocab_size: int  # words of the output layer
    weight_bytes: int  # of one weight (4 in fp32, 1 in int8)
    cache_bytes: int  # of the largest cache; 0 where it is not known


def work(subnet: Subnet, task: TranslationTask) -> np.ndarray:
    """The features named by `WORK`, experts under uniform routing."""
    n, steps = task.source_length, task.target_length
    q, e, d = subnet.qkv_dim, subnet.encoder.embed_dim, subnet.decoder.embed_dim
    value = dict.fromkeys(WORK, 0.0)
    value["constant"] = 1.0
    for layer in subnet.encoder.layers:
        one, all_touched, calls = _experts(layer, n, e)
        value["encoder layers"] += 1
        value["encoder attention"] += n * 4 * e * q / 1e6
        value["encoder heads"] += n * n * layer.heads / 1e6
        value["encoder experts"] += n * one
        value["encoder expert weights"] += all_touched
        value["encoder expert calls"] += calls
    read = 0.0  # by one step
    for layer in subnet.decoder.layers:
        one, all_touched, calls = _experts(layer, task.beam_size, d)
        attention, span = 6 * d * q / 1e6, layer.cross_span * n * 2 * q / 1e6
        value["cross-attention set-up"] += layer.cross_span * n * e * 2 * q / 1e6
        value["decoder layers"] += steps
        value["decoder attention"] += steps * attention
        value["decoder heads"] += steps * (layer.self_heads + layer.cross_heads)
        value["cross-attention span"] += steps * span
        value["decoder expert"] += steps * one
        value["decoder expert weights"] += steps * all_touched
        value["decoder expert calls"] += steps * calls
        value["decoder routers"] += steps * (len(layer.experts) > 1)
        read += attention + span + all_touched
    output = d * task.vocab_size / 1e6
    value["output layer"] = steps * output
    cache = task.cache_bytes / task.weight_bytes / 1e6
    if cache:
        value["beyond the cache"] = steps * max(0.0, read + output - cache)
    return np.array([value[name] for name in WORK])


def _experts(layer: Any, rows: int, dim: int) -> tuple[float, float, float]:
    """For one layer: millions of weights of `top_k` average experts, millions of weights of the
    experts that `rows` rows touch, and the number of touched experts.
    """
    sizes = np.array(layer.experts, float)
    count = len(sizes)
    touched = 1 - (1 - layer.top_k / count) ** rows
    one = layer.top_k * 2 * dim * sizes.mean() / 1e6
    return one, touched * 2 * dim * sizes.sum() / 1e6, touched * np.count_nonzero(sizes)


def averages(subnet: Subnet) -> np.ndarray:
    """HAT's ten features; a layer's FFN size is the mean of its experts."""
    encoder, decoder = subnet.encoder, subnet.decoder
    return np.array(
        [
            encoder.embed_dim,
            len(encoder.layers),
            np.mean([np.mean(x.experts) for x in encoder.layers]),
            np.mean([x.heads for x in encoder.layers]),
            decoder.embed_dim,
            len(decoder.layers),
            np.mean([np.mean(x.experts) for x in decoder.layers]),
            np.mean([x.self_heads for x in decoder.layers]),
            np.mean([x.cross_heads for x in decoder.layers]),
            np.mean([x.cross_span for x in decoder.layers]),
        ],
        float,
    )


def products(averages_NF: np.ndarray) -> np.ndarray:
    """`averages` and their products with the depths: (N, 10) to (N, 20), named by `PRODUCTS`."""
    ed, el, ef, eh, dd, dl, df, dh, dx, da = np.asarray(averages_NF, float).T
    more = [dl * dd, dl * df, dl * df * dd, dl * dh, dl * dx, dl * da, dl * da * ed]
    more += [el * ef * ed, el * eh, dl * dd * dd]
    return np.stack([ed, el, ef, eh, dd, dl, df, dh, dx, da, *more], axis=1)
