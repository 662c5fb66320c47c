"""Checks the manifest of an export before anything is made from it: types, and bounds on all sizes.

An export may come from anywhere; what passes here can be loaded with the memory that its own files
take.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from automoe_jax.architecture import subnet as subnets
from automoe_jax.architecture.space import GATES
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.decoding.config import PLATFORMS, QUANTIZATIONS
from automoe_jax.system.errors import UserError

KERNELS = ("native", "xla")
# Kernels by the cells of a subnet.
KERNELS_OF = {"transformer": KERNELS, "evolved": ("xla",)}
# Far above any model of today, and low enough that no product of two overflows.
MOST_WIDTH, MOST_FFN, MOST_LAYERS, MOST_EXPERTS = 1 << 16, 1 << 20, 256, 4096
MOST_WORDS, MOST_BEAMS = 1 << 24, 256


def check(path: Path, manifest: dict[str, Any]):
    """Raises `UserError` naming the first field of a manifest that is missing or wrong."""

    def wrong(name: str, allowed: str) -> UserError:
        found = repr(manifest[name])[:60] if name in manifest else "missing"
        return UserError(f"export manifest {path}: {name} is {found}; allowed: {allowed}")

    for name, (fits, allowed) in _FIELDS.items():
        if name not in manifest or not fits(manifest[name]):
            raise wrong(name, allowed)
    try:
        subnet = subnets.from_json(manifest["subnet"])
    except UserError as e:
        raise UserError(f"export manifest {path}: subnet: {e}") from None
    if others := set(manifest["kernels"]) - set(KERNELS_OF[subnet.cell]):
        wanted = f"{', '.join(KERNELS_OF[subnet.cell])} for {subnet.cell} cells"
        raise wrong("kernels", f"{wanted}, not {', '.join(sorted(others))}")
    _check_sizes(path, subnet)
    for (side, stack), base in zip(subnet.stacks, manifest["base_dims"], strict=True):
        if base < stack.embed_dim:
            raise wrong("base_dims", f"at least the {side}'s width {stack.embed_dim}")
    if manifest["shortlist"] > manifest["vocab_sizes"][1]:
        raise wrong("shortlist", f"0 to the {manifest['vocab_sizes'][1]} target words")


def _check_sizes(path: Path, subnet: Subnet):
    sizes = [("subnet.qkv_dim", subnet.qkv_dim, MOST_WIDTH)]
    n_experts = 0
    for side, stack in subnet.stacks:
        n_experts += sum(len(layer.experts) for layer in stack.layers)
        sizes += [
            (f"subnet.{side}.embed_dim", stack.embed_dim, MOST_WIDTH),
            (f"subnet.{side}.layers", len(stack.layers), MOST_LAYERS),
        ]
        sizes += [
            (f"subnet.{side}.layers[{i}].experts", size, MOST_FFN)
            for i, layer in enumerate(stack.layers)
            for size in layer.experts
        ]
    sizes.append(("the number of experts", n_experts, MOST_EXPERTS))
    for name, size, most in sizes:
        if size > most:
            raise UserError(f"export manifest {path}: {name} is {size}; at most {most} are allowed")


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _ints(low: int, high: int, count: int | None = None) -> Callable[[Any], bool]:
    """A list of integers in these bounds; of any positive length for None."""

    def fits(value: Any) -> bool:
        right = isinstance(value, list) and value and len(value) == (count or len(value))
        return bool(right) and all(_is_int(x, low, high) for x in value)

    return fits


def _among(names: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and bool(x) and all(n in names for n in x)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


# What each field of a manifest must fulfil, and how to say it.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "subnet": (_is(dict), "a subnet, as in subnet files"),
    "base_dims": (_ints(1, MOST_WIDTH, 2), f"two widths, 1 to {MOST_WIDTH}"),
    "gate": (lambda x: x in GATES, ", ".join(GATES)),
    "vocab_sizes": (_ints(4, MOST_WORDS, 2), f"two sizes, 4 to {MOST_WORDS}"),
    "quantization": (lambda x: x in QUANTIZATIONS, ", ".join(QUANTIZATIONS)),
    "shortlist": (lambda x: _is_int(x, 0, MOST_WORDS), f"0 to {MOST_WORDS}"),
    "beam_sizes": (_ints(1, MOST_BEAMS), f"sizes from 1 to {MOST_BEAMS}"),
    "platforms": (_among(PLATFORMS), ", ".join(PLATFORMS)),
    "kernels": (_among(KERNELS), ", ".join(KERNELS)),
    "layout": (_is(str), "a text"),
    "tokenizer": (lambda x: x is None or isinstance(x, str), "a kind of tokenizer, or null"),
    "languages": (lambda x: x is None or (_texts(x) and len(x) == 2), "two languages, or null"),
    "weights_from": (_is(str), "a text"),
    "samples": (_texts, "a list of sentences"),
    "scores": (_is(dict), "an object"),
    "config": (_is(dict), "an object"),
}
