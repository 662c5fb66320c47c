"""HAT's and AutoMoE's subtransformer YAML: one architecture.

Sources: github.com/mit-han-lab/hardware-aware-transformers, configs/*/subtransformer, and the
output of evo_search.py of github.com/microsoft/AutoMoE. The keys mean what their code makes of
them: without the expert keys a layer is dense; `std-vs-dummy-experts` 0 makes the first expert an
identity, also where it is the only one; `num-experts-to-route` is cut to the experts of a layer.
"""

import re
from typing import Any

from automoe_jax.architecture import subnet as subnets
from automoe_jax.architecture.subnet import DEFAULT_QKV_DIM, STACKS, Subnet, SubnetError
from automoe_jax.published.options import WRITTEN_SPANS, Options, read, write

_WIDTH, _DEPTH, _FFN = (
    f"{name}-subtransformer" for name in ("embed-dim", "layer-num", "ffn-embed-dim-all")
)
_HEADS = {
    "encoder": {"heads": "encoder-self-attention-heads-all-subtransformer"},
    "decoder": {
        "self_heads": "decoder-self-attention-heads-all-subtransformer",
        "cross_heads": "decoder-ende-attention-heads-all-subtransformer",
    },
}
_SPAN = "decoder-arbitrary-ende-attn-all-subtransformer"
_EXPERTS = ("n-experts", "num-experts-to-route", "std-vs-dummy-experts",
            "each-expert-ffn-dim-listoflist")  # fmt: skip
_DROPS = ("drop-mha-sublayer", "drop-ffn-sublayer")
# Keys of the supertransformer, where common.yml is in the same file.
_COMMON = ("embed-dim", "ffn-embed-dim", "layers")
_NAMES = (_WIDTH, _DEPTH, _FFN, *_EXPERTS, *_DROPS, *_COMMON)
_KNOWN = {f"{side}-{name}" for side in STACKS for name in _NAMES}
_KNOWN |= {key for keys in _HEADS.values() for key in keys.values()}
_KNOWN |= {_SPAN, "qkv-dim", "share-all-embeddings", "share-decoder-input-output-embed"}
_MAX_LAYERS = 1000
_SIZES = re.compile(r"['\"]?([0-9]+(?:_[0-9]+)*)['\"]?")


def parse(text: str, qkv_dim: int = DEFAULT_QKV_DIM) -> Subnet:
    """The subnet of a subtransformer file; `SubnetError` names a missing, unknown or wrong key.

    Lists may be longer than the number of layers, as in HAT's own files; the front entries count.
    """
    options = read(text, _KNOWN, "subtransformer", SubnetError)
    stacks: dict[str, Any] = {side: _stack(options, side) for side in STACKS}
    return Subnet(qkv_dim=options.integer("qkv-dim", qkv_dim), **stacks)


def _stack(options: Options, side: str) -> subnets.Encoder | subnets.Decoder:
    depth = options.integer(f"{side}-{_DEPTH}")
    if not 1 <= depth <= _MAX_LAYERS:
        raise SubnetError(
            f"{side}-{_DEPTH} is {depth}; it must be a positive integer up to {_MAX_LAYERS}"
        )
    for name in _DROPS:
        if 0 in options.integers(f"{side}-{name}", (1,) * depth, depth):
            raise SubnetError(
                f"{side}-{name} drops a sublayer (0): this project has no such architecture; use 1 "
                "for every layer"
            )
    fields = {name: options.integers(key, depth=depth) for name, key in _HEADS[side].items()}
    if side == "decoder":
        fields["cross_span"] = options.spans(_SPAN, depth)
    stack_type = STACKS[side]
    layers = tuple(
        stack_type.layer_type(**{k: v[i] for k, v in fields.items()}, experts=sizes, top_k=top_k)
        for i, (sizes, top_k) in enumerate(_experts(options, side, depth))
    )
    return stack_type(options.integer(f"{side}-{_WIDTH}"), layers)


def _experts(options: Options, side: str, depth: int) -> list[tuple[tuple[int, ...], int]]:
    """(sizes, top_k) of each layer."""
    dense = options.integers(f"{side}-{_FFN}", depth=depth)
    if min(dense) < 1:
        raise SubnetError(
            f"{side}-{_FFN} has {min(dense)}; positive sizes are needed (an identity expert is a 0 "
            "in std-vs-dummy-experts)"
        )
    counts_key, top_k_key, standard_key, lists_key = (f"{side}-{name}" for name in _EXPERTS)
    if not options.given(counts_key):
        for key in (standard_key, lists_key):
            if options.given(key):
                raise SubnetError(f"{key} needs {counts_key}")
        return [((size,), 1) for size in dense]
    counts = options.integers(counts_key, depth=depth)
    top_ks = options.integers(top_k_key, (1,) * depth, depth)
    standard = options.integers(standard_key, (1,) * depth, depth)
    lists = options.front(lists_key, depth) if options.given(lists_key) else None
    if options.integers(standard_key, (1,)) == (0,):
        raise SubnetError(
            f"{standard_key} is [0], and the published code does not read a list of one entry; "
            "write [0, 0] for an identity expert, [1] for none"
        )
    layers = []
    for i, (size, n, top_k) in enumerate(zip(dense, counts, top_ks, strict=True)):
        for key, value, right, allowed in (
            (counts_key, n, n >= 1, "1 and more"),
            (top_k_key, top_k, top_k >= 1, "1 and more"),
            (standard_key, standard[i], standard[i] in (0, 1), "0 and 1"),
        ):
            if not right:
                raise SubnetError(f"{key} has {value} for layer {i}; allowed: {allowed}")
        sizes = (size,) * n
        if lists is not None:
            sizes = _listed(lists_key, lists[i])
            if len(sizes) < n:
                raise SubnetError(f"{lists_key} has {len(sizes)} size(s) for {n} experts")
        if standard[i] == 0:
            sizes = (0, *sizes[1:])
        layers.append((sizes[:n], min(top_k, n)))
    return layers


def _listed(key: str, entry: Any) -> tuple[int, ...]:
    """The sizes of '3072_1024', or of a YAML list of numbers."""
    texts = entry if isinstance(entry, list) else [entry]
    sizes = []
    for text in texts:
        match = _SIZES.fullmatch(str(text).strip())
        if match is None:
            raise SubnetError(f"{key} has {text!r}; sizes such as '3072_1024' are needed")
        sizes += [int(x) for x in match.group(1).split("_")]
    if 0 in sizes:
        raise SubnetError(
            f"{key} has the size 0; an identity expert is a 0 in std-vs-dummy-experts"
        )
    return tuple(sizes)


def dump(subnet: Subnet) -> str:
    """The subtransformer file of a subnet, as AutoMoE's search writes it.

    `qkv-dim` is written unless it is the published 512. Raises `SubnetError` for an identity expert
    that is not the first of its layer, a cross-attention span above 3, or evolved cells.
    """
    if subnet.cell == "evolved":
        raise SubnetError("cell is evolved; subtransformer files hold Transformers, write JSON")
    stacks, cross_spans = subnet.stacks, [layer.cross_span for layer in subnet.decoder.layers]
    for i, span in enumerate(cross_spans):
        if span not in WRITTEN_SPANS:
            where = f"decoder.layers[{i}].cross_span is {span}"
            raise SubnetError(f"{where}; a subtransformer file has spans up to 3")
    sizes = {side: _written_sizes(side, stack.layers) for side, stack in stacks}
    heads = [
        (key, [getattr(layer, name) for layer in stack.layers])
        for side, stack in stacks
        for name, key in _HEADS[side].items()
    ]
    spans = [WRITTEN_SPANS[span] for span in cross_spans]
    return write([
        [(f"{side}-{_WIDTH}", stack.embed_dim) for side, stack in stacks],
        [(f"{side}-{_FFN}", [max(own) for own in sizes[side]]) for side in STACKS],
        [(f"{side}-{_DEPTH}", len(stack.layers)) for side, stack in stacks],
        heads,
        [(_SPAN, spans)],
        [("qkv-dim", subnet.qkv_dim)] if subnet.qkv_dim != DEFAULT_QKV_DIM else [],
        *(_written_experts(side, stack.layers, sizes[side]) for side, stack in stacks),
    ])  # fmt: skip


def _written_sizes(side: str, layers: Any) -> list[list[int]]:
    """Sizes of each layer's experts; a first identity expert gets a placeholder size."""
    largest = max(max(layer.experts) for layer in layers) or 1
    written = []
    for i, layer in enumerate(layers):
        if 0 in layer.experts[1:]:
            raise SubnetError(
                f"{side}.layers[{i}].experts is {list(layer.experts)}: the published code knows an "
                "identity expert (0) only as the first of its layer; put it there"
            )
        first = layer.experts[0] or max(layer.experts) or largest
        written.append([first, *layer.experts[1:]])
    return written


def _written_experts(side: str, layers: Any, sizes: list[list[int]]) -> list[tuple[str, Any]]:
    """The expert keys of one stack; none for a dense one."""
    if all(len(layer.experts) == 1 and layer.experts[0] for layer in layers):
        return []
    counts_key, top_k_key, standard_key, lists_key = (f"{side}-{name}" for name in _EXPERTS)
    lines: list[tuple[str, Any]] = [
        (counts_key, [len(layer.experts) for layer in layers]),
        (top_k_key, [layer.top_k for layer in layers]),
    ]
    if any(layer.experts[0] == 0 for layer in layers):
        standard = [int(layer.experts[0] > 0) for layer in layers]
        # The published code does not read a list of one entry; of a longer one, the front.
        lines.append((standard_key, [*standard, 1][: max(len(standard), 2)]))
    if any(len(set(own)) > 1 for own in sizes):
        lines.append((lists_key, ["_".join(map(str, own)) for own in sizes]))
    return lines
