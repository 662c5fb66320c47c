"""The weights of a stand-alone subnet, laid out for translating.

A linear map is `NAME.kernel`, `NAME.bias` and, in int8, `NAME.scale` of a flat dict. Kernels are
dense, (K, N), for XLA's products, or packed in panels of columns for the native kernels and for
files (`decoding.layout`). Letters: V words, D embedding, K inputs, N outputs, P panels.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from automoe_jax.architecture.subnet import LayerSpec, Subnet
from automoe_jax.decoding import evolved_weights
from automoe_jax.decoding.layout import ATTENTION, LISTED, PANEL, output_name
from automoe_jax.model.extract import Params

Weights = dict[str, np.ndarray]
KERNEL = ".kernel"
TABLES = ("embedding", "source_embedding", "target_embedding", "output")
NORMS = ("self_attention_norm", "cross_attention_norm", "experts_norm")
# Largest int8 value: the range is symmetric, -127 to 127.
INT8_MAX = 127


def prepare(params: Params, subnet: Subnet) -> Weights:
    """The dense fp32 weights that the inference program reads, of `stand_alone(subnet, ...)`.

    Linear maps of the same input are joined (Q, K and V of self-attention; K and V of
    cross-attention), and every expert has matrices of its own, so that an expert without tokens is
    not read. The output layer is a table (V, D): the embeddings, where they are shared and as wide
    as the decoder (`tables`).
    """
    weights = {name: params[name]["table"] for name in TABLES if name in params}
    if "embedding" in params and subnet.decoder.embed_dim < params["embedding"]["table"].shape[1]:
        weights["output"] = params["embedding"]["table"][:, : subnet.decoder.embed_dim]
    if subnet.cell == "evolved":
        weights |= evolved_weights.prepare(params, subnet)
    else:
        for side, stack in subnet.stacks:
            for i, layer in enumerate(stack.layers):
                own = _layer(params[side][f"layer_{i}"], layer)
                weights |= {f"{side}.{i}.{name}": w for name, w in own.items()}
    return {name: np.ascontiguousarray(w, np.float32) for name, w in weights.items()}


def _layer(params: Params, layer: LayerSpec) -> dict[str, Any]:
    weights = {}
    for name, (module, parts) in ATTENTION.items():
        if module in params:
            for leaf in ("kernel", "bias"):
                joined = [np.asarray(params[module][part][leaf]) for part in parts]
                weights[f"{name}.{leaf}"] = np.concatenate(joined, axis=-1)
    for name in NORMS:
        if name in params:
            weights |= {f"{name}.{leaf}": params[name][leaf] for leaf in ("scale", "bias")}
    experts, start = {leaf: np.asarray(w) for leaf, w in params["experts"].items()}, 0
    for e, size in enumerate(layer.experts):
        if size:
            rows = slice(start, start + size)
            weights[f"expert_{e}.fc1.kernel"] = experts["fc1"][rows].T
            weights[f"expert_{e}.fc1.bias"] = experts["fc1_bias"][rows]
            weights[f"expert_{e}.fc2.kernel"] = experts["fc2"][rows]
            weights[f"expert_{e}.fc2.bias"] = experts["fc2_bias"][e]
        start += size
    if len(layer.experts) > 1:
        weights |= {"router.kernel": experts["router"], "router.bias": experts["router_bias"]}
    return weights


def params_of(weights: Weights, subnet: Subnet) -> Params:
    """Inverts `prepare`: params of `stand_alone(subnet, ...)` from dense weights.

    Int8 matrices come out as the fp32 ones that they stand for.
    """
    params: Params = {name: {"table": weights[name]} for name in TABLES if name in weights}
    if "embedding" in weights:
        params.pop("output", None)  # a part of the embeddings
    elif f"output{KERNEL}" in weights:
        params["output"] = {"table": _linear(weights, "output", subnet.decoder.embed_dim)[0].T}
    if subnet.cell == "evolved":
        return params | evolved_weights.params_of(
            functools.partial(_linear, weights), weights, subnet
        )
    for side, stack in subnet.stacks:
        params[side] = {
            f"layer_{i}": _layer_params(weights, f"{side}.{i}.", layer, subnet)
            for i, layer in enumerate(stack.layers)
        }
    return params


def _layer_params(weights: Weights, prefix: str, layer: LayerSpec, subnet: Subnet) -> Params:
    dim = (subnet.encoder if prefix.startswith("encoder") else subnet.decoder).embed_dim
    inputs = dict.fromkeys(("qkv", "cross_q"), dim) | {"cross_kv": subnet.encoder.embed_dim}
    params: Params = {}
    for name, (module, parts) in ATTENTION.items():
        if f"{prefix}{name}{KERNEL}" in weights:
            maps = _linear(weights, prefix + name, inputs.get(name, subnet.qkv_dim))
            joined = [np.split(w, len(parts), axis=-1) for w in maps]
            own = params.setdefault(module, {})
            for part, kernel, bias in zip(parts, *joined, strict=True):
                own[part] = {"kernel": kernel, "bias": bias}
    for name in NORMS:
        if f"{prefix}{name}.scale" in weights:
            params[name] = {leaf: weights[f"{prefix}{name}.{leaf}"] for leaf in ("scale", "bias")}
    params["experts"] = _expert_params(weights, prefix, layer, dim)
    return params


def _expert_params(weights: Weights, prefix: str, layer: LayerSpec, dim: int) -> Params:
    params: Params = {}
    sized = [e for e, size in enumerate(layer.experts) if size]
    if sized:
        fc1 = [_linear(weights, f"{prefix}expert_{e}.fc1", dim) for e in sized]
        fc2 = [_linear(weights, f"{prefix}expert_{e}.fc2", layer.experts[e]) for e in sized]
        params["fc1"] = np.concatenate([kernel.T for kernel, _ in fc1])
        params["fc1_bias"] = np.concatenate([bias for _, bias in fc1])
        params["fc2"] = np.concatenate([kernel for kernel, _ in fc2])
        params["fc2_bias"] = np.zeros((len(layer.experts), fc2[0][1].size), np.float32)
        params["fc2_bias"][sized] = [bias for _, bias in fc2]
    if len(layer.experts) > 1:
        params["router"], params["router_bias"] = _linear(weights, f"{prefix}router", dim)
    return params


def _linear(weights: Weights, name: str, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A linear map's fp32 matrix (K, N) and its bias, (0,) if it has none."""
    kernel_KN = weights[name + KERNEL]
    bias_N = weights.get(f"{name}.bias", np.zeros(0, np.float32))
    if kernel_KN.dtype == np.int8:
        # An unpacked one has rows of zeros up to a multiple of 4.
        kernel_KN = kernel_KN[:inputs].astype(np.float32) * weights[f"{name}.scale"]
    return kernel_KN, bias_N


class Tables(NamedTuple):
    """The embeddings and the fp32 output layer; one array where they are shared."""

    source: Any
    target: Any
    output: Any


def tables(weights: dict[str, Any]) -> Tables:
    """The tables among `weights`."""
    source = weights.get("source_embedding", weights.get("embedding"))
    target = weights.get("target_embedding", weights.get("embedding"))
    return Tables(source, target, weights.get("output", target))


def is_matrix(name: str) -> bool:
    """Whether an entry is a kernel that is packed and quantised; a router's is neither."""
    return name.endswith(KERNEL) and not name.endswith(f".router{KERNEL}")


def quantize(weights: Weights) -> Weights:
    """Dense weights with int8 matrices: symmetric, one scale per output column.

    The output layer becomes the matrix `output` (D, V), unless there is a shortlist, which leaves
    little of it to compute; embeddings, routers, norms and biases stay fp32. There is no
    calibration: activations are quantised row by row at run time.
    """
    result = dict(weights)
    if LISTED not in weights:
        result[f"output{KERNEL}"] = weights[output_name(weights)].T
        result.pop("output", None)
    for name in filter(is_matrix, list(result)):
        w_KN = result[name]
        scale_N = np.abs(w_KN).max(axis=0) / INT8_MAX
        inverse_N = np.divide(1, scale_N, out=np.zeros_like(scale_N), where=scale_N > 0)
        result[name] = np.rint(w_KN * inverse_N).astype(np.int8)
        result[f"{name.removesuffix(KERNEL)}.scale"] = scale_N.astype(np.float32)
    return result


def pack(weights: Weights) -> Weights:
    """Dense weights in the layout of files; with a shortlist the output layer stays a table."""
    result: Weights = {}
    whole = f"output{KERNEL}" in weights or LISTED in weights
    table = None if whole else output_name(weights)
    for name, w in weights.items():
        own = name.removesuffix(KERNEL)
        if name == table:
            result[name] = _panels(w.T)
        elif not is_matrix(name):
            result.setdefault(name, w)
        elif w.dtype == np.int8:
            k, n = w.shape
            quads = np.pad(w, ((0, -k % 4), (0, -n % PANEL)))
            quads = quads.reshape(-1, 4, quads.shape[1] // PANEL, PANEL)
            result[name] = np.ascontiguousarray(quads.transpose(2, 0, 3, 1))
            result[f"{own}.scale"] = np.pad(weights[f"{own}.scale"], (0, -n % PANEL))
            result[f"{own}.total"] = np.pad(w.sum(axis=0, dtype=np.int32), (0, -n % PANEL))
        else:
            result[name] = _panels(w)
    return result


def _panels(w_KN: np.ndarray) -> np.ndarray:
    k, n = w_KN.shape
    padded = np.pad(w_KN, ((0, 0), (0, -n % PANEL)))
    return np.ascontiguousarray(padded.reshape(k, -1, PANEL).transpose(1, 0, 2))


def unpack(weights: Weights, words: int) -> Weights:
    """Inverts `pack`, with `words` output words; inputs of int8 matrices stay padded to 4."""
    result: Weights = {}
    for name, w in weights.items():
        own = name.removesuffix(KERNEL)
        if name in TABLES and w.ndim == 3:
            table_VD = w.transpose(0, 2, 1).reshape(-1, w.shape[1])
            result[name] = np.ascontiguousarray(table_VD[:words])
        elif is_matrix(name):
            bias = weights.get(f"{own}.bias")
            n = words if bias is None else bias.size
            if w.dtype == np.int8:
                dense = w.transpose(1, 3, 0, 2).reshape(w.shape[1] * 4, -1)
                result[f"{own}.scale"] = weights[f"{own}.scale"][:n]
            else:
                dense = w.transpose(1, 0, 2).reshape(w.shape[1], -1)
            result[name] = np.ascontiguousarray(dense[:, :n])
        elif not name.endswith(".total"):
            result.setdefault(name, w)
    return result
