"""The weights of a stand-alone subnet, laid out for translating.

A matrix is two or more entries of a flat dict: `NAME.kernel` with, where it is int8, `NAME.scale`,
and `NAME.bias` where it has one. Two layouts of kernels:

- dense: (K, N), what XLA's products take;
- packed: panels of `native.PANEL` columns, what the kernels take: (P, K, PANEL) in fp32,
  (P, ceil(K / 4), PANEL, 4) in int8, with `NAME.scale` padded to whole panels and `NAME.total`, the
  sums of the columns, beside it. Files hold this one.

Letters: V words, D embedding, K inputs, N outputs, P panels.
"""

from typing import Any, NamedTuple

import numpy as np

from automoe_jax.architecture.subnet import DecoderLayer, EncoderLayer, Subnet
from automoe_jax.decoding.native import PANEL
from automoe_jax.model.extract import Params

Weights = dict[str, np.ndarray]
KERNEL = ".kernel"
# Of a lexicon: target words of each source word (V, n), -1 where there are fewer; those that any
# sentence may use.
LISTED, COMMON = "shortlist.words", "shortlist.common"
TABLES = ("embedding", "source_embedding", "target_embedding", "output")
# int8 goes from -127 to 127: the range is symmetric.
STEPS = 127


def prepare(params: Params, subnet: Subnet) -> Weights:
    """The dense weights that the inference program reads, fp32.

    What reads the same input is fused (Q, K and V of self-attention; K and V of cross-attention),
    and every expert has matrices of its own (an expert that gets no token is then not read). The
    output layer is a table (V, D), that of the embeddings where one is shared with it and the
    decoder has that table's full width (`tables`).

    Args:
      params: of `Transformer(arch=subnet)`.
      subnet: the architecture.
    """
    weights: Weights = {}

    def put(name: str, *arrays, axis: int = -1):
        arrays = [np.asarray(a, np.float32) for a in arrays]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)
        weights[name] = np.ascontiguousarray(joined)

    for name in TABLES:
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
    """The same arrays where they are shared."""

    source: Any
    target: Any
    output: Any


def tables(weights: dict[str, Any]) -> Tables:
    """The embeddings of source and target and the fp32 output layer among `weights`."""
    source = weights.get("source_embedding", weights.get("embedding"))
    target = weights.get("target_embedding", weights.get("embedding"))
    return Tables(source, target, weights.get("output", target))


def output_name(weights: dict[str, Any]) -> str:
    """Name of the fp32 table that is the output layer."""
    return next(n for n in ("output", "target_embedding", "embedding") if n in weights)


def is_matrix(name: str) -> bool:
    """Whether an entry is the kernel of a matrix that is packed and quantised: not of a router."""
    return name.endswith(KERNEL) and not name.endswith(f".router{KERNEL}")


def quantize(weights: Weights) -> Weights:
    """Dense weights with int8 matrices: symmetric, a scale for each output (column).

    The output layer becomes the matrix `output` (D, V), unless a shortlist leaves little of it to
    compute; embeddings, routers, norms and biases stay fp32. Nothing is calibrated: activations are
    quantised row by row as they come.
    """
    result = dict(weights)
    if LISTED not in weights:
        result[f"output{KERNEL}"] = weights[output_name(weights)].T
        result.pop("output", None)
    for name in [n for n in result if is_matrix(n)]:
        w_KN = result[name]
        scale_N = np.abs(w_KN).max(axis=0) / STEPS
        inverse_N = np.divide(1, scale_N, out=np.zeros_like(scale_N), where=scale_N > 0)
        result[name] = np.rint(w_KN * inverse_N).astype(np.int8)
        result[f"{name.removesuffix(KERNEL)}.scale"] = scale_N.astype(np.float32)
    return result


def pack(weights: Weights) -> Weights:
    """Dense weights in the kernels' layout; with a shortlist, the output layer stays a table."""
    result: Weights = {}
    whole = f"output{KERNEL}" in weights or LISTED in weights
    table = None if whole else output_name(weights)
    for name, w in weights.items():
        if name == table:
            result[name] = _panels(w.T)
        elif not is_matrix(name):
            result[name] = w
        elif w.dtype == np.int8:
            own = name.removesuffix(KERNEL)
            k, n = w.shape
            quads = np.pad(w, ((0, -k % 4), (0, -n % PANEL)))
            quads = quads.reshape(-1, 4, quads.shape[1] // PANEL, PANEL)
            result[name] = np.ascontiguousarray(quads.transpose(2, 0, 3, 1))
            result[f"{own}.total"] = np.pad(w.sum(axis=0, dtype=np.int32), (0, -n % PANEL))
        else:
            result[name] = _panels(w)
    for name in [n for n in result if is_matrix(n) and result[n].dtype == np.int8]:
        own = name.removesuffix(KERNEL)
        scale = result[f"{own}.scale"]
        result[f"{own}.scale"] = np.pad(scale, (0, -scale.size % PANEL))
    return result


def _panels(w_KN: np.ndarray) -> np.ndarray:
    k, n = w_KN.shape
    padded = np.pad(w_KN, ((0, 0), (0, -n % PANEL)))
    return np.ascontiguousarray(padded.reshape(k, -1, PANEL).transpose(1, 0, 2))


def unpack(weights: Weights, words: int) -> Weights:
    """Packed weights as dense ones; inputs of int8 matrices stay padded to multiples of 4.

    Args:
      weights: of `pack`.
      words: V of the output layer.
    """
    result: Weights = {}
    for name, w in weights.items():
        if name in TABLES and w.ndim == 3:
            result[name] = np.ascontiguousarray(
                w.transpose(0, 2, 1).reshape(-1, w.shape[1])[:words]
            )
        elif name.endswith(".total"):
            continue
        elif is_matrix(name):
            own = name.removesuffix(KERNEL)
            bias = weights.get(f"{own}.bias")
            n = words if bias is None else bias.size
            if w.dtype == np.int8:
                dense = w.transpose(1, 3, 0, 2).reshape(w.shape[1] * 4, -1)
                result[f"{own}.scale"] = weights[f"{own}.scale"][:n]
            else:
                dense = w.transpose(1, 0, 2).reshape(w.shape[1], -1)
            result[name] = np.ascontiguousarray(dense[:, :n])
        elif name not in result:
            result[name] = w
    return result


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
            put(f"{prefix}.expert_{e}.fc1.kernel", np.asarray(experts["fc1"][rows]).T)
            put(f"{prefix}.expert_{e}.fc1.bias", experts["fc1_bias"][rows])
            put(f"{prefix}.expert_{e}.fc2.kernel", experts["fc2"][rows])
            put(f"{prefix}.expert_{e}.fc2.bias", experts["fc2_bias"][e])
        start += size
    if len(layer.experts) > 1:
        put(f"{prefix}.router.kernel", experts["router"])
        put(f"{prefix}.router.bias", experts["router_bias"])
    norm("experts_norm")
