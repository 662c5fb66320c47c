"""Pictures of architectures: a card of one, statistics of those on a front."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from automoe_jax.report.plots import LABELS, LOSS, save

SIDES = {"encoder": "tab:blue", "decoder": "tab:orange"}
_UNITS = {
    "latency_ms": "ms",
    "gflops": "GFLOPs",
    "active_params_m": "active M",
    "params_m": "params M",
    "size_mb": "MB",
}


def attention(layer: dict[str, Any]) -> tuple[str, str]:
    """Heads of a layer ("8", or "8 / 4" for self- and cross-attention) and the latter's span."""
    if "heads" in layer:
        return str(layer["heads"]), ""
    return f"{layer['self_heads']} / {layer['cross_heads']}", f"span {layer['cross_span']}"


def architecture_card(subnet: dict[str, Any], costs: dict[str, float], score: float, path: Path):
    """FFN sizes of all experts of a subnet in JSON form (the paper's Figures 4 to 6)."""
    stacks = [subnet[side]["layers"] for side in SIDES]
    depth = max(map(len, stacks))
    sizes = [layer["experts"] for layers in stacks for layer in layers]
    largest, count = max(map(max, sizes)) or 1, max(map(len, sizes))
    figsize = (9, 1.7 + 0.62 * depth)
    figure, both = plt.subplots(1, 2, figsize=figsize, layout="constrained", sharey=True)
    for axes, (side, color) in zip(both, SIDES.items(), strict=True):
        for i, layer in enumerate(subnet[side]["layers"]):
            for j, size in enumerate(layer["experts"]):
                axes.barh(
                    i, 0.94 * max(size / largest, 0.03), left=j, height=0.62,
                    color=color if size else "lightgray", alpha=0.45 + 0.5 * size / largest,
                )  # fmt: skip
                axes.text(j + 0.03, i, str(size) if size else "identity", va="center", fontsize=8)
            heads, span = attention(layer)
            text = f"{heads} heads\n{span}".strip()
            axes.text(count + 0.05, i, text, va="center", fontsize=8, color="dimgray")
        axes.set_xlim(0, count + 0.02)
        axes.set_ylim(-0.6, depth - 0.4)
        axes.set_xticks([j + 0.47 for j in range(count)], [f"expert {j + 1}" for j in range(count)])
        axes.tick_params(axis="x", labelsize=8, length=0)
        axes.set_yticks(range(depth), [f"layer {i + 1}" for i in range(depth)])
        axes.set_title(f"{side}, width {subnet[side]['embed_dim']}", fontsize=10)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    known = [f"{_UNITS.get(name, name)} {value:.4g}" for name, value in costs.items()]
    figure.suptitle("   ".join([f"score {score:.4f}", *known]), fontsize=9)
    save(figure, path)


def statistics(subnets: list[dict[str, Any]]) -> dict[str, float]:
    """Shares over architectures in JSON form (the paper's Figure 3 and section 5).

    `encoder_share` of all experts; `several_share` of layers with two or more experts;
    `mixed_share` of those layers whose experts differ in size.
    """
    encoder, decoder = (
        [layer["experts"] for subnet in subnets for layer in subnet[side]["layers"]]
        for side in SIDES
    )
    layers = encoder + decoder
    several = [x for x in layers if len(x) > 1]
    return {
        "encoder_share": sum(map(len, encoder)) / sum(map(len, layers)),
        "several_share": len(several) / len(layers),
        "mixed_share": sum(len(set(x)) > 1 for x in several) / max(1, len(several)),
    }


def front_statistics(members: list[dict[str, Any]], x_name: str, path: Path, y_label: str = LOSS):
    """Costs, depths and experts of the architectures on a front (the paper's Figure 3).

    Each member is {"loss", "costs", "subnet"}; `x_name` is the cost of the front.
    """
    figure, ((top, experts), (depth, shares)) = plt.subplots(
        2, 2, figsize=(10, 7.4), layout="constrained"
    )
    points = sorted((m["costs"][x_name], m["loss"]) for m in members)
    top.plot([p[0] for p in points], [p[1] for p in points], "o-", color="tab:red", markersize=4)
    top.set_xlabel(LABELS.get(x_name, x_name))
    top.set_ylabel(y_label, fontsize=9)
    top.set_title(f"front of {len(members)} subnets", fontsize=10)
    _experts_per_layer(experts, members)
    _depth_over_costs(depth, members)
    found = statistics([m["subnet"] for m in members])
    names = ["experts that are\nin the encoder", "layers with two\nor more experts",
             "of those, with\nmixed sizes"]  # fmt: skip
    bars = shares.bar(names, [100 * v for v in found.values()], color="tab:purple", width=0.55)
    shares.bar_label(bars, fmt="%.0f %%", fontsize=9)
    shares.set_ylim(0, 112)
    shares.set_ylabel("share (%)")
    for axes in (top, experts, depth, shares):
        axes.grid(alpha=0.3, axis="y")
    save(figure, path)


def _depth_over_costs(axes, members: list[dict[str, Any]]):
    """Decoder layers over FLOPs (lower axis) and over latency or size (upper axis)."""
    layers = [len(m["subnet"]["decoder"]["layers"]) for m in members]
    second = "latency_ms" if "latency_ms" in members[0]["costs"] else "size_mb"
    for own, name, color, marker in (
        (axes, "gflops", "tab:blue", "o"), (axes.twiny(), second, "tab:green", "^")
    ):  # fmt: skip
        costs = [m["costs"][name] for m in members]
        own.scatter(costs, layers, s=26, color=color, marker=marker, alpha=0.7)
        own.set_xlabel(LABELS[name], color=color)
    axes.set_ylabel("decoder layers")
    axes.set_yticks(sorted(set(layers)))


def _experts_per_layer(axes, members: list[dict[str, Any]]):
    """Mean number of experts of each layer, over the subnets that have it."""
    for shift, (side, color) in zip((-0.2, 0.2), SIDES.items(), strict=True):
        stacks = [m["subnet"][side]["layers"] for m in members]
        depth = max(map(len, stacks))
        means = [
            np.mean([len(s[i]["experts"]) for s in stacks if i < len(s)]) for i in range(depth)
        ]
        at = np.arange(1, depth + 1) + shift
        axes.bar(at, means, width=0.38, color=color, alpha=0.8, label=side)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("experts, mean")
    axes.legend(fontsize=9)
