"""Shows which words go to which expert.

python launch/routing.py --config FILE --workdir DIR                        # the trained subnet
python launch/routing.py --config FILE --workdir DIR --subnet best_1.json   # inherited weights

On validation text, or another --split: entropy of each router, load of each expert, share of tokens
by FFN size, the experts of frequent and rare words, of first, middle and last pieces of words, how
many FLOPs the FFNs spend on tokens, and what is lost with other experts than the routers'.
"""

import math
from collections.abc import Iterator
from typing import Any

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.model.extract import inherited
from automoe_jax.phases import routing
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.weights import origin, subnet_params, supernet_params, trained_folder
from automoe_jax.published import subnet_files

CONFIG = RunFlags()
_SUBNET = flags.DEFINE_string(
    "subnet", None, "subnet file to look at with the supernet's weights; without it, the run's "
    "trained subnet"
)  # fmt: skip
_SPLIT = flags.DEFINE_string("split", "valid", "split of the corpus to look at")
_PAIRS = flags.DEFINE_integer("pairs", 0, "pairs to look at; 0 for all", lower_bound=0)
_JSON = options.define_json("print the result as one JSON line")


def main():
    config = CONFIG.load()
    subnet = subnet_files.load(_SUBNET.value, config.space.qkv_dim) if _SUBNET.value else None
    if subnet is not None:
        config.space.validate(subnet)
    CONFIG.require()
    run = CONFIG.open_run(config)
    data = prepare(run)
    if subnet is None:
        folder = trained_folder(run)
        params, subnet, step = subnet_params(run, folder)
        source = origin(
            run.path / folder, "trained subnet", step, config.subnet_training.final_weights
        )
    else:
        whole, step = supernet_params(run, data.tokenizer.vocab_sizes)
        params = inherited(whole, subnet, config.space)
        source = origin(run.supernet, "supernet", step, config.training.final_weights)
    folder = run.path / routing.FOLDER
    result = routing.analyse(run, data, params, subnet, source, folder, _PAIRS.value, _SPLIT.value)
    if _JSON.value:
        terminal.print_json(result)
        return
    print(f"{result['weights_from']}; {result['pairs']:,} pairs of {result['split']}")
    several = [layer for layer in result["layers"] if len(layer["sizes"]) > 1]
    if not several:
        print("every layer has one expert: there is nothing to route")
        return
    classes = [label for name in ("frequency", "place") for label in several[0].get(name, {})]
    header = ("layer", "expert", "FFN", "all", *classes)
    terminal.print_table(header, [row for layer in several for row in _rows(layer)])
    print("columns: which share of the tokens of a class each expert gets")
    for layer in several:
        sizes = ", ".join(f"{size}: {x:.0%}" for size, x in layer["share_by_size"].items())
        print(
            f"{layer['layer']}: entropy {layer['entropy']:.2f} of at most "
            f"{math.log(len(layer['sizes'])):.2f} nats; tokens by FFN size {sizes}"
        )
    for side, own in result["computation"].items():
        print(f"{side}: {_flops(own)}")
    losses = result["losses"]
    print(
        f"loss {losses['learned']:.4f} nats a token; with the same gates and random "
        f"experts {losses['random']:.4f}, with the largest for all {losses['largest']:.4f}"
    )
    print(f"picture: {folder / routing.PICTURE}")


def _flops(own: dict[str, Any]) -> str:
    """What the FFNs of a side compute for a token, in all and by class."""
    by_class = ", ".join(f"{label} {x['mean'] / 1e6:.3f}" for label, x in own["classes"].items())
    whole = own["all"]
    return (
        f"{whole['mean'] / 1e6:.3f} ± {whole['std'] / 1e6:.3f} MFLOPs a token in FFNs "
        f"({own['least'] / 1e6:.3f} to {own['most'] / 1e6:.3f} possible); {by_class}"
    )


def _rows(layer: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each expert of a layer."""
    classes = [shares for name in ("frequency", "place") for shares in layer.get(name, {}).values()]
    for e, (size, load) in enumerate(zip(layer["sizes"], layer["load"], strict=True)):
        shares = (f"{x:.0%}" for x in (load, *(own[e] for own in classes)))
        yield (layer["layer"] if e == 0 else "", str(e + 1), str(size), *shares)
