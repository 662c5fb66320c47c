"""The weights of a stand-alone subnet, laid out for translating."""

from typing import Any, NamedTuple

import numpy as np

from automoe_jax.extract import Params
from automoe_jax.subnet import DecoderLayer, EncoderLayer, Subnet

Weights = dict[str, np.ndarray]


def prepare(params: Params, subnet: Subnet) -> Weights:
    """A flat dict of what the inference program reads.

    What reads the same input is fused (Q, K and V of self-attention; K and V of cross-attention),
    every expert is an array of its own (an expert that gets no token is then not read), and
    matrices are stored (in, out): on CPU that is the faster way for the few rows of a beam. The
    output layer is (V, D), the faster way for its size; it is a table of embeddings where one is
    shared with it and the decoder has that table's full width (`tables`).

    Args:
      params: of `Transformer(arch=subnet)`.
      subnet: the architecture.
    """
    weights: Weights = {}

    def put(name: str, *arrays, axis: int = -1):
        arrays = [np.asarray(a, np.float32) for a in arrays]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)
        weights[name] = np.ascontiguousarray(joined)

    for name in ("embedding", "source_embedding", "target_embedding", "output"):
        if name in params:
            put(name, params[name]["table"])
    if "embedding" in params and subnet.decoder.embed_dim < weights["embedding"].shape[1]:
        put("output", weights["embedding"][:, : subnet.decoder.embed_dim])
    for side, stack in (("encoder", subnet.encoder), ("decoder", subnet.decoder)):
        for i, layer in enumerate(stack.layers):
            own = params[side][f"layer_{i}"]
            _layer(put, f"{side}.{i}", own, layer)
    return weights


class Tables(NamedTuple):
    """(V, D) each; the same array where they are shared."""

    source: Any
    target: Any
    output: Any


def tables(weights: dict[str, Any]) -> Tables:
    """The embeddings of source and target and the output layer among `weights`."""
    source = weights.get("source_embedding", weights.get("embedding"))
    target = weights.get("target_embedding", weights.get("embedding"))
    return Tables(source, target, weights.get("output", target))


def _layer(put, prefix: str, own: Params, layer: EncoderLayer | DecoderLayer):
    def linear(name: str, attention: Params, parts: tuple[str, ...]):
        for leaf in ("kernel", "bias"):
            put(f"{prefix}.{name}.{leaf}", *(attention[p][leaf] for p in parts))

    def norm(name: str):
        for leaf in ("scale", "bias"):
            put(f"{prefix}.{name}.{leaf}", own[name][leaf])

    linear("qkv", own["self_attention"], ("query", "key", "value"))
    linear("self_out", own["self_attention"], ("out",))
    norm("self_attention_norm")
    if isinstance(layer, DecoderLayer):
        cross = own["cross_attention"]
        linear("cross_q", cross, ("query",))
        linear("cross_kv", cross, ("key", "value"))
        linear("cross_out", cross, ("out",))
        norm("cross_attention_norm")
    experts = own["experts"]
    start = 0
    for e, size in enumerate(layer.experts):
        if size:
            rows = slice(start, start + size)
            put(f"{prefix}.expert_{e}.fc1", np.asarray(experts["fc1"][rows]).T)
            put(f"{prefix}.expert_{e}.fc1_bias", experts["fc1_bias"][rows])
            put(f"{prefix}.expert_{e}.fc2", experts["fc2"][rows])
            put(f"{prefix}.expert_{e}.fc2_bias", experts["fc2_bias"][e])
        start += size
    if len(layer.experts) > 1:
        put(f"{prefix}.router.kernel", experts["router"])
        put(f"{prefix}.router.bias", experts["router_bias"])
    norm("experts_norm")
