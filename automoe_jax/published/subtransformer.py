"""HAT's and AutoMoE's subtransformer YAML: one architecture.

Sources: github.com/mit-han-lab/hardware-aware-transformers, configs/*/subtransformer, and what
evo_search.py of github.com/microsoft/AutoMoE writes. Their meaning is that of their code: without
the expert keys a layer is dense; `std-vs-dummy-experts` 0 makes the first expert an identity, also
where it is the only one; `num-experts-to-route` is cut to the experts that a layer has.
"""

import re
from typing import Any

from automoe_jax.architecture.subnet import (
    DEFAULT_QKV_DIM,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Subnet,
    SubnetError,
)
from automoe_jax.published.options import SIDES, SPANS, WRITTEN_SPANS, Options, line, read

_SPAN = "decoder-arbitrary-ende-attn-all-subtransformer"
_CROSS = "decoder-ende-attention-heads-all-subtransformer"
_MOST_LAYERS = 1000
_SIZES = re.compile(r"['\"]?([0-9]+(?:_[0-9]+)*)['\"]?")


def _key(side: str, name: str) -> str:
    return f"{side}-{name}"


_REQUIRED = (
    "embed-dim-subtransformer",
    "layer-num-subtransformer",
    "ffn-embed-dim-all-subtransformer",
    "self-attention-heads-all-subtransformer",
)
_EXPERTS = ("n-experts", "num-experts-to-route", "std-vs-dummy-experts",
            "each-expert-ffn-dim-listoflist", "drop-mha-sublayer", "drop-ffn-sublayer")  # fmt: skip
_KNOWN = {_key(side, name) for side in SIDES for name in (*_REQUIRED, *_EXPERTS)}
_KNOWN |= {_CROSS, _SPAN, "qkv-dim", "share-all-embeddings", "share-decoder-input-output-embed"}
_KNOWN |= {
    _key(side, name) for side in SIDES for name in ("embed-dim", "ffn-embed-dim", "layers")
}  # of the supertransformer, where common.yml is in the same file


def parse(text: str, qkv_dim: int = DEFAULT_QKV_DIM) -> Subnet:
    """The subnet of a subtransformer file.

    Args:
      text: the YAML. Lists may be longer than the number of layers, as in HAT's own files; the
        front entries count.
      qkv_dim: the Q/K/V width where the file has no `qkv-dim` (theirs leave it to common.yml).

    Raises:
      SubnetError: names the key that is missing, unknown or wrong.
    """
    options = read(text, _KNOWN, "subtransformer", SubnetError)
    depth = {side: options.integer(_key(side, "layer-num-subtransformer")) for side in SIDES}
    for side, n in depth.items():
        if not 1 <= n <= _MOST_LAYERS:
            key = _key(side, "layer-num-subtransformer")
            raise SubnetError(f"{key} is {n}; it must be a positive integer up to {_MOST_LAYERS}")
        for name in ("drop-mha-sublayer", "drop-ffn-sublayer"):
            if 0 in options.layers(_key(side, name), n, 1):
                raise SubnetError(
                    f"{_key(side, name)} drops a sublayer (0): this project has no such "
                    "architecture; use 1 for every layer"
                )

    encoder_experts = _experts(options, "encoder", depth["encoder"])
    decoder_experts = _experts(options, "decoder", depth["decoder"])
    spans = options.layers(_SPAN, depth["decoder"])
    for span in spans:
        if span not in SPANS:
            raise SubnetError(f"{_SPAN} has {span}; allowed: -1, 1 and 2")
    return Subnet(
        qkv_dim=options.integer("qkv-dim", qkv_dim),
        encoder=Encoder(
            options.integer(_key("encoder", "embed-dim-subtransformer")),
            tuple(
                EncoderLayer(n, *experts)
                for n, experts in zip(
                    options.layers(
                        "encoder-self-attention-heads-all-subtransformer", depth["encoder"]
                    ),
                    encoder_experts,
                    strict=True,
                )
            ),
        ),
        decoder=Decoder(
            options.integer(_key("decoder", "embed-dim-subtransformer")),
            tuple(
                DecoderLayer(self_heads, cross_heads, SPANS[span], *experts)
                for self_heads, cross_heads, span, experts in zip(
                    options.layers(
                        "decoder-self-attention-heads-all-subtransformer", depth["decoder"]
                    ),
                    options.layers(_CROSS, depth["decoder"]),
                    spans,
                    decoder_experts,
                    strict=True,
                )
            ),
        ),
    )


def _experts(options: Options, side: str, depth: int) -> list[tuple[tuple[int, ...], int]]:
    """(sizes, top_k) of each layer."""
    dense = options.layers(_key(side, "ffn-embed-dim-all-subtransformer"), depth)
    for size in dense:
        if size < 1:
            raise SubnetError(
                f"{_key(side, 'ffn-embed-dim-all-subtransformer')} has {size}; positive sizes "
                "are needed (an identity expert is a 0 in std-vs-dummy-experts)"
            )
    if not options.given(_key(side, "n-experts")):
        for name in ("std-vs-dummy-experts", "each-expert-ffn-dim-listoflist"):
            if options.given(_key(side, name)):
                raise SubnetError(f"{_key(side, name)} needs {_key(side, 'n-experts')}")
        return [((size,), 1) for size in dense]
    counts = options.layers(_key(side, "n-experts"), depth)
    routed = options.layers(_key(side, "num-experts-to-route"), depth, 1)
    standard = options.layers(_key(side, "std-vs-dummy-experts"), depth, 1)
    lists_key = _key(side, "each-expert-ffn-dim-listoflist")
    lists = options.front(lists_key, depth) if options.given(lists_key) else None
    if options.integers(_key(side, "std-vs-dummy-experts"), (1,)) == (0,):
        raise SubnetError(
            f"{_key(side, 'std-vs-dummy-experts')} is [0], and the published code does not read a "
            "list of one entry; write [0, 0] for an identity expert, [1] for none"
        )
    layers = []
    for i, (size, n) in enumerate(zip(dense, counts, strict=True)):
        for key, value, allowed in (
            (_key(side, "n-experts"), n, n >= 1),
            (_key(side, "num-experts-to-route"), routed[i], routed[i] >= 1),
            (_key(side, "std-vs-dummy-experts"), standard[i], standard[i] in (0, 1)),
        ):
            if not allowed:
                raise SubnetError(f"{key} has {value} for layer {i}; it makes no sense there")
        sizes = (size,) * n
        if lists is not None:
            sizes = _listed(lists_key, lists[i])
            if len(sizes) < n:
                raise SubnetError(f"{lists_key} has {len(sizes)} size(s) for {n} experts")
        if standard[i] == 0:
            sizes = (0, *sizes[1:])
        layers.append((sizes[:n], min(routed[i], n)))
    return layers


def _listed(key: str, entry: Any) -> tuple[int, ...]:
    """The sizes of '3072_1024'; a YAML list of numbers is taken too."""
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

    `qkv-dim` is written where it is not the published 512.

    Raises:
      SubnetError: the published code has no such architecture: an identity expert that is not the
        first of its layer, or a cross-attention span above 3.
    """
    stacks = {"encoder": subnet.encoder, "decoder": subnet.decoder}
    depth = {side: len(stack.layers) for side, stack in stacks.items()}
    heads = {
        "encoder-self-attention-heads-all-subtransformer": [
            layer.heads for layer in subnet.encoder.layers
        ],
        "decoder-self-attention-heads-all-subtransformer": [
            layer.self_heads for layer in subnet.decoder.layers
        ],
        _CROSS: [layer.cross_heads for layer in subnet.decoder.layers],
    }
    for i, layer in enumerate(subnet.decoder.layers):
        if layer.cross_span not in WRITTEN_SPANS:
            raise SubnetError(
                f"decoder.layers[{i}].cross_span is {layer.cross_span}; a subtransformer file "
                "has spans up to 3"
            )
    spans = [WRITTEN_SPANS[layer.cross_span] for layer in subnet.decoder.layers]
    sizes = {side: _written_sizes(side, stack.layers) for side, stack in stacks.items()}

    def both(name: str, values: dict[str, Any]) -> str:
        return "".join(line(_key(side, name), values[side]) for side in SIDES) + "\n"

    text = both("embed-dim-subtransformer", {s: x.embed_dim for s, x in stacks.items()})
    text += both("ffn-embed-dim-all-subtransformer", {s: [max(x) for x in sizes[s]] for s in SIDES})
    text += both("layer-num-subtransformer", depth)
    text += "".join(line(key, value) for key, value in heads.items()) + "\n"
    text += line(_SPAN, spans)
    if subnet.qkv_dim != DEFAULT_QKV_DIM:
        text += "\n" + line("qkv-dim", subnet.qkv_dim)
    for side, stack in stacks.items():
        text += _written_experts(side, stack.layers, sizes[side])
    return text


def _written_sizes(side: str, layers: Any) -> list[list[int]]:
    """Sizes of each layer's experts; a first identity expert gets one that nobody reads."""
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


def _written_experts(side: str, layers: Any, sizes: list[list[int]]) -> str:
    """The expert keys of one stack; none for a dense one."""
    if all(len(layer.experts) == 1 and layer.experts[0] for layer in layers):
        return ""
    text = "\n" + line(_key(side, "n-experts"), [len(layer.experts) for layer in layers])
    text += line(_key(side, "num-experts-to-route"), [layer.top_k for layer in layers])
    if any(layer.experts[0] == 0 for layer in layers):
        standard = [int(layer.experts[0] > 0) for layer in layers]
        # The published code does not read a list of one entry; of a longer one, the front.
        text += line(_key(side, "std-vs-dummy-experts"), [*standard, 1][: max(len(standard), 2)])
    if any(len(set(own)) > 1 for own in sizes):
        listed = ["_".join(map(str, own)) for own in sizes]
        text += line(_key(side, "each-expert-ffn-dim-listoflist"), listed)
    return text
