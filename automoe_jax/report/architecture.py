"""Pictures of architectures: a card of one, statistics of those on a front."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from automoe_jax.report.plots import LABELS, LOSS, save

_COLORS = {"encoder": "tab:blue", "decoder": "tab:orange"}


def architecture_card(subnet: dict[str, Any], costs: dict[str, float], score: float, path: Path):
    """Experts and their sizes, layer by layer, one below the other (the paper's Figures 4 to 6).

    Args:
      subnet: JSON form.
      costs: by name.
      score: of the search.
      path: PNG to write.
    """
    stacks = [(side, subnet[side]) for side in ("encoder", "decoder")]
    depth = max(len(stack["layers"]) for _, stack in stacks)
    largest = max(max(x["experts"]) for _, stack in stacks for x in stack["layers"]) or 1
    most = max(len(x["experts"]) for _, stack in stacks for x in stack["layers"])
    figure, both = plt.subplots(
        1, 2, figsize=(9, 1.7 + 0.62 * depth), layout="constrained", sharey=True
    )
    for axes, (side, stack) in zip(both, stacks, strict=True):
        for i, layer in enumerate(stack["layers"]):
            for j, size in enumerate(layer["experts"]):
                width = 0.94 * max(size, 0.03 * largest) / largest
                axes.barh(
                    i, width, left=j, height=0.62, align="center",
                    color=_COLORS[side] if size else "lightgray", alpha=0.45 + 0.5 * size / largest,
                )  # fmt: skip
                axes.text(j + 0.03, i, str(size) if size else "identity", va="center", fontsize=8)
        axes.set_xlim(0, most + 0.02)
        axes.set_ylim(-0.6, depth - 0.4)
        axes.set_xticks([j + 0.47 for j in range(most)], [f"expert {j + 1}" for j in range(most)])
        axes.tick_params(axis="x", labelsize=8, length=0)
        labels = [_heads(layer) for layer in stack["layers"]]
        labels += [""] * (depth - len(labels))
        axes.set_yticks(range(depth), [f"layer {i + 1}" for i in range(depth)])
        for i, text in enumerate(labels):
            axes.text(most + 0.05, i, text, va="center", fontsize=8, color="dimgray")
        axes.set_title(f"{side}, width {stack['embed_dim']}", fontsize=10)
        for spine in ("top", "right", "bottom"):
            axes.spines[spine].set_visible(False)
    known = [f"{_short(name)} {value:.4g}" for name, value in costs.items()]
    figure.suptitle(f"score {score:.4f}   " + "   ".join(known), fontsize=9)
    save(figure, path)


def _heads(layer: dict[str, Any]) -> str:
    if "heads" in layer:
        return f"{layer['heads']} heads"
    return f"{layer['self_heads']} / {layer['cross_heads']} heads\nspan {layer['cross_span']}"


def _short(name: str) -> str:
    return {
        "latency_ms": "ms",
        "gflops": "GFLOPs",
        "active_params_m": "active M",
        "params_m": "params M",
        "size_mb": "MB",
    }.get(name, name)


def statistics(subnets: list[dict[str, Any]]) -> dict[str, float]:
    """Shares over some architectures in JSON form, as the paper's Figure 3 and section 5 tell.

    Returns:
      `encoder_share` of all experts; `several_share` of layers with two or more experts;
      `mixed_share` of those layers whose experts differ in size.
    """
    layers = [
        (side, layer["experts"])
        for subnet in subnets
        for side in ("encoder", "decoder")
        for layer in subnet[side]["layers"]
    ]
    experts = sum(len(x) for _, x in layers)
    several = [x for _, x in layers if len(x) > 1]
    return {
        "encoder_share": sum(len(x) for side, x in layers if side == "encoder") / experts,
        "several_share": len(several) / len(layers),
        "mixed_share": sum(len(set(x)) > 1 for x in several) / max(1, len(several)),
    }


def front_statistics(members: list[dict[str, Any]], x_name: str, path: Path, y_label: str = LOSS):
    """What the architectures on a front look like (the paper's Figure 3).

    Args:
      members: {"loss", "costs", "subnet"} each.
      x_name: cost of the front.
      path: PNG to write.
      y_label: what the score is.
    """
    figure, ((top, experts), (depth, shares)) = plt.subplots(
        2, 2, figsize=(10, 7.4), layout="constrained"
    )
    points = sorted((m["costs"][x_name], m["loss"]) for m in members)
    top.plot([p[0] for p in points], [p[1] for p in points], "o-", color="tab:red", markersize=4)
    top.set(xlabel=LABELS.get(x_name, x_name), ylabel=y_label)
    top.yaxis.label.set_fontsize(9)
    top.set_title(f"front of {len(members)} subnets", fontsize=10)

    _experts_per_layer(experts, members)
    second = "latency_ms" if "latency_ms" in members[0]["costs"] else "size_mb"
    layers = [len(m["subnet"]["decoder"]["layers"]) for m in members]
    depth.scatter(
        [m["costs"]["gflops"] for m in members], layers, s=26, color="tab:blue", alpha=0.7
    )
    depth.set_xlabel(LABELS["gflops"], color="tab:blue")
    depth.set_ylabel("decoder layers")
    depth.set_yticks(sorted(set(layers)))
    other = depth.twiny()
    other.scatter(
        [m["costs"][second] for m in members],
        layers,
        s=26,
        color="tab:green",
        marker="^",
        alpha=0.7,
    )
    other.set_xlabel(LABELS[second], color="tab:green")

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


def _experts_per_layer(axes, members: list[dict[str, Any]]):
    """Mean number of experts of each layer, over the subnets that have it."""
    for shift, side in ((-0.2, "encoder"), (0.2, "decoder")):
        stacks = [m["subnet"][side]["layers"] for m in members]
        depth = max(map(len, stacks))
        means = [
            np.mean([len(s[i]["experts"]) for s in stacks if i < len(s)]) for i in range(depth)
        ]
        at = np.arange(1, depth + 1) + shift
        axes.bar(at, means, width=0.38, color=_COLORS[side], alpha=0.8, label=side)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("experts, mean")
    axes.legend(fontsize=9)
