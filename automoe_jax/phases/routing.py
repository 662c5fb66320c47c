"""Which words of a text go to which expert of a trained subnet, and what is computed for them."""

from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet, to_json
from automoe_jax.data import words
from automoe_jax.data.tokenizers.base import SideName
from automoe_jax.data.tokens import PreparedData
from automoe_jax.model.extract import Params
from automoe_jax.phases.prepare import split_tokens
from automoe_jax.phases.run import Run
from automoe_jax.phases.weights import target
from automoe_jax.report import plots
from automoe_jax.system import files
from automoe_jax.training.evaluation import take_pairs
from automoe_jax.training.routing import (
    LayerRouting,
    ffn_flops,
    ffn_flops_range,
    losses_by_routing,
    routing_of,
)

_Classes = tuple[np.ndarray, tuple[str, ...]]  # of each token, and their names

FOLDER, RESULT, PICTURE = "routing", "routing.json", "routing.png"
_SENTENCES = 6  # that are shown token by token


def analyse(
    run: Run,
    data: PreparedData,
    params: Params,
    subnet: Subnet,
    origin: str,
    folder: Path,
    pairs: int = 0,
    split: str = "valid",
) -> dict[str, Any]:
    """The routing of a subnet with these weights on `pairs` pairs of a split, 0 for all.

    Writes `routing.json`, whose content it returns, and `routing.png` and `.svg` if a layer has
    several experts, into the folder. `origin` says where the weights come from.
    """
    config, text = run.config, data.valid if split == "valid" else split_tokens(run, split)
    if 0 < pairs < len(text):
        text = take_pairs(text, np.arange(pairs))
    own = target(config, data.tokenizer.vocab_sizes, subnet)
    routings = routing_of(own, params, text, config.training)
    # All layers of a stack read the same tokens.
    ids = {routing.side: routing.ids_N for routing in routings}
    classes = {side: _token_classes(data, ids_N, side) for side, ids_N in ids.items()}
    layers = [_described(routing, classes[routing.side]) for routing in routings]
    routed = any(len(layer["sizes"]) > 1 for layer in layers)
    losses = losses_by_routing(own, params, text, config.training) if routed else None
    sides = {side: [x for x in routings if x.side == side] for side in ids}
    adaptive = {
        side: _computation(data, side, layers_of, stack.embed_dim, classes[side])
        for (side, layers_of), (_, stack) in zip(sides.items(), subnet.stacks, strict=True)
        if any(len(set(x.sizes)) > 1 for x in layers_of)
    }
    result = {
        "version": 1, "weights_from": origin, "split": split, "pairs": len(text),
        "subnet": to_json(subnet), "losses": losses, "layers": layers, "computation": adaptive,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    if several := [layer for layer in layers if len(layer["sizes"]) > 1]:
        plots.routing_plot(several, *plots.with_svg(folder / PICTURE))
    files.write_json(folder / RESULT, result)
    return result


def _computation(
    data: PreparedData,
    side: str,
    routings: list[LayerRouting],
    width: int,
    classes: dict[str, _Classes],
) -> dict[str, Any]:
    """How many FLOPs the FFNs of a side spend on tokens, and on those of some sentences."""
    flops_N, ids_N, eos_first = ffn_flops(routings, width), routings[0].ids_N, side == "decoder"
    parts_N = words.parts(ids_N, eos_first=eos_first)
    by_class = {
        label: _spread(flops_N[class_N == c])
        for class_N, labels in (*classes.values(), (parts_N, words.PARTS))
        for c, label in enumerate(labels)
        if (class_N == c).any()
    }
    name: SideName = "source" if side == "encoder" else "target"
    sentence_N = words.sentences(ids_N, eos_first=eos_first)
    least, most = ffn_flops_range(routings, width)
    shown = [
        {
            "pieces": data.tokenizer.pieces(ids_N[sentence_N == s].tolist(), name),
            "flops": flops_N[sentence_N == s].tolist(),
        }
        for s in range(min(_SENTENCES, int(sentence_N[-1]) + 1))
    ]
    return {
        "least": least, "most": most, "all": _spread(flops_N), "classes": by_class,
        "sentences": shown,
    }  # fmt: skip


def _spread(flops_N: np.ndarray) -> dict[str, float]:
    return {"mean": float(flops_N.mean()), "std": float(flops_N.std())}


def _token_classes(data: PreparedData, ids_N: np.ndarray, side: str) -> dict[str, _Classes]:
    """The classes of the tokens that the layers of a stack read."""
    name: SideName = "source" if side == "encoder" else "target"
    vocab_size = data.tokenizer.vocab_sizes[name == "target"]
    frequency_N = words.bands(getattr(data.train, name), vocab_size)[ids_N]
    borders = data.tokenizer.word_borders(name)
    if borders is None:
        return {"frequency": (frequency_N, tuple(words.BANDS))}
    place_N = words.places(ids_N, *borders)
    frequency_N = np.where(place_N < 0, -1, frequency_N)
    return {"frequency": (frequency_N, tuple(words.BANDS)), "place": (place_N, words.PLACES)}


def _described(routing: LayerRouting, classes: dict[str, _Classes]) -> dict[str, Any]:
    """A layer's entry of `routing.json`; shares are lists with one entry per expert."""
    return {
        "layer": f"{routing.side} {routing.number}",
        "sizes": list(routing.sizes),
        "tokens": len(routing.ids_N),
        "entropy": routing.entropy,
        "load": routing.load_E.tolist(),
        "share_by_size": {str(k): v for k, v in routing.share_by_size.items()},
        **{
            name: dict(zip(labels, routing.share_EC(own, len(labels)).T.tolist(), strict=True))
            for name, (own, labels) in classes.items()
        },
    }
