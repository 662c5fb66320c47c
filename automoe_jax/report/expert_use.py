"""Which experts the tokens of a text use, and what is computed for them, in HTML."""

import math
from pathlib import Path
from typing import Any

from automoe_jax.report.elements import html_table, picture, shaded

_CLASSES = ("frequency", "place")  # of tokens, in the entry of a layer


def sections(results: dict[str, Any], routed: Path, level: int = 2) -> str:
    """Both sections by the `results.json` of a pipeline's report, with the picture `routed`.

    Their headings have the `level`.
    """
    sides = results.get("computation") or {}
    return _routing(results, routed, f"h{level}") + _computation(sides, level)


def _routing(results: dict[str, Any], routed: Path, heading: str) -> str:
    """The section on routers; empty where every layer has one expert."""
    losses = results.get("routing_losses")
    several = [layer for layer in results.get("routing", ()) if len(layer["sizes"]) > 1]
    if not several:
        return ""
    rows = [["layer", "entropy", "load of each expert"]]
    for layer in several:
        load = ", ".join(f"{share:.0%}" for share in layer["load"])
        most = math.log(len(layer["sizes"]))
        rows.append([layer["layer"], f"{layer['entropy']:.2f} of {most:.2f}", load])
    choice = ""
    if losses is not None:  # reports of earlier versions have none
        choice = (
            f" What the routers' choice is worth: a loss of {losses['learned']:.3f} nats a token; "
            f"with the same gates and random experts {losses['random']:.3f}, with the largest "
            f"expert of each layer {losses['largest']:.3f}."
        )
    return f"""<{heading}>Routing</{heading}>
{html_table("layers", rows)}
<p><small>On test text. Entropy of the router's probabilities in nats, and its maximum: there
the router has no preference. Below, which share of the tokens of a class each expert gets: of
frequent and rare ones, and by their place in a word.{choice}</small></p>
{picture(routed, "share of the tokens of each expert, by class")}
{_sizes(several)}"""


def _sizes(layers: list[dict[str, Any]]) -> str:
    """The table of FFN sizes by the classes of tokens; empty where no layer has several sizes."""
    labels = [label for name in _CLASSES for label in layers[0].get(name, {})]
    rows = [["tokens by FFN size", "FFN", "all", *labels]]
    for layer in (layer for layer in layers if len(layer["share_by_size"]) > 1):
        for i, (size, whole) in enumerate(layer["share_by_size"].items()):
            classes = (share_E for name in _CLASSES for share_E in layer.get(name, {}).values())
            shares = (_of_size(layer["sizes"], share_E, int(size)) for share_E in classes)
            cells = (f"{share:.0%}" for share in (whole, *shares))
            rows.append(["" if i else layer["layer"], size, *cells])
    return html_table("layers", rows) if len(rows) > 1 else ""


def _of_size(sizes: list[int], share_E: list[float], size: int) -> float:
    """The share of tokens that experts of a size have, of the shares that each expert has."""
    return sum(share for own, share in zip(sizes, share_E, strict=True) if own == size)


def _computation(sides: dict[str, Any], level: int) -> str:
    """The section on what is computed for which tokens; empty where it is as much for all."""
    if not sides:
        return ""
    labels = list(dict.fromkeys(label for own in sides.values() for label in own["classes"]))
    rows = [["MFLOPs of a token", "least", "most", "mean ± deviation", *labels]]
    sentences = []
    for side, own in sides.items():
        classes = own["classes"]
        ends = (f"{own[end] / 1e6:.3f}" for end in ("least", "most"))
        means = [f"{classes[k]['mean'] / 1e6:.3f}" if k in classes else "" for k in labels]
        whole = f"{own['all']['mean'] / 1e6:.3f} ± {own['all']['std'] / 1e6:.3f}"
        rows.append([side, *ends, whole, *means])
        span = own["most"] - own["least"]
        lines = "".join(
            shaded(
                one["pieces"],
                [(flops - own["least"]) / span for flops in one["flops"]],
                [f"{flops / 1e6:.3f} MFLOPs" for flops in one["flops"]],
            )
            for one in own["sentences"]
        )
        sentences.append(f"<h{level + 1}>Read by the {side}</h{level + 1}>{lines}")
    return f"""<h{level}>What is computed for which token</h{level}>
{html_table("layers", rows)}
<p><small>FFNs of all layers of a side, on test text; means of frequent and rare tokens, of their
places in a word, and of thirds of a sentence. Below, the darker a token the more is computed for
it; a dot begins or ends a sentence.</small></p>
{"".join(sentences)}
"""
