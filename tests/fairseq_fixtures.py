"""Reads `fixtures/` of the shared test data: weights of the published implementation."""

import json
from pathlib import Path

import numpy as np

from automoe_jax.subnet import Subnet, from_json

QKV_DIM = 32


def params_from_state_dict(state: dict[str, np.ndarray], hull: Subnet) -> dict:
    """The params of a supernet of architecture `hull` from a fairseq state dict."""

    def linear(weight, bias):
        return {"kernel": weight.T, "bias": bias}

    def attention(prefix):
        w, b = state[f"{prefix}.in_proj_weight"], state[f"{prefix}.in_proj_bias"]
        out = {
            name: linear(w[i * QKV_DIM : (i + 1) * QKV_DIM], b[i * QKV_DIM : (i + 1) * QKV_DIM])
            for i, name in enumerate(("query", "key", "value"))
        }
        out["out"] = linear(state[f"{prefix}.out_proj.weight"], state[f"{prefix}.out_proj.bias"])
        return out

    def norm(prefix):
        return {"scale": state[f"{prefix}.weight"], "bias": state[f"{prefix}.bias"]}

    def experts(prefix, n):
        if f"{prefix}.fc1.weight" in state:
            return {
                "fc1": state[f"{prefix}.fc1.weight"],
                "fc1_bias": state[f"{prefix}.fc1.bias"],
                "fc2": state[f"{prefix}.fc2.weight"].T,
                "fc2_bias": state[f"{prefix}.fc2.bias"][None],
            }
        own = [f"{prefix}.switch_layer.experts.{e}" for e in range(n)]
        return {
            "fc1": np.concatenate([state[f"{p}.0.weight"] for p in own]),
            "fc1_bias": np.concatenate([state[f"{p}.0.bias"] for p in own]),
            "fc2": np.concatenate([state[f"{p}.1.weight"].T for p in own]),
            "fc2_bias": np.stack([state[f"{p}.1.bias"] for p in own]),
            "router": state[f"{prefix}.switch_layer.switch.weight"].T,
            "router_bias": state[f"{prefix}.switch_layer.switch.bias"],
        }

    params = {"embedding": {"table": state["encoder.embed_tokens.weight"]}}
    for side, stack in (("encoder", hull.encoder), ("decoder", hull.decoder)):
        params[side] = {}
        for i, layer in enumerate(stack.layers):
            prefix = f"{side}.layers.{i}"
            params[side][f"layer_{i}"] = out = {
                "self_attention": attention(f"{prefix}.self_attn"),
                "self_attention_norm": norm(f"{prefix}.self_attn_layer_norm"),
                "experts": experts(prefix, len(layer.experts)),
                "experts_norm": norm(f"{prefix}.final_layer_norm"),
            }
            if side == "decoder":
                out["cross_attention"] = attention(f"{prefix}.encoder_attn")
                out["cross_attention_norm"] = norm(f"{prefix}.encoder_attn_layer_norm")
    return params


def load_case(folder: Path, name: str) -> tuple[Subnet, dict, dict[str, np.ndarray]]:
    """(subnet, the JSON, the arrays) of one fixture."""
    info = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as arrays:
        return from_json(info["subnet"], QKV_DIM), info, dict(arrays)
