"""`Subnet`: one architecture, as a frozen dataclass and as JSON."""

import dataclasses
from typing import Any

from automoe_jax.system.errors import UserError

VERSION = 1
DEFAULT_QKV_DIM = 512


class SubnetError(UserError):
    """A subnet that is not an architecture, or a file that does not hold one."""


@dataclasses.dataclass(frozen=True)
class EncoderLayer:
    """`experts` holds the FFN size of each expert: one entry is a dense FFN, 0 an identity."""

    heads: int
    experts: tuple[int, ...]
    top_k: int = 1


@dataclasses.dataclass(frozen=True)
class DecoderLayer:
    """As `EncoderLayer`; `cross_span` last encoder layers are attended to."""

    self_heads: int
    cross_heads: int
    cross_span: int
    experts: tuple[int, ...]
    top_k: int = 1


@dataclasses.dataclass(frozen=True)
class Encoder:
    embed_dim: int
    layers: tuple[EncoderLayer, ...]


@dataclasses.dataclass(frozen=True)
class Decoder:
    embed_dim: int
    layers: tuple[DecoderLayer, ...]


@dataclasses.dataclass(frozen=True)
class Subnet:
    """One architecture. Hashable, so that it can key a cache.

    Raises:
      SubnetError: a size is not a positive integer, heads do not divide `qkv_dim`, a
        cross-attention span is longer than the encoder, or `top_k` exceeds the experts.
    """

    encoder: Encoder
    decoder: Decoder
    qkv_dim: int = DEFAULT_QKV_DIM

    def __post_init__(self):
        _check_int(self.qkv_dim, "qkv_dim", 1)
        for side, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            _check_int(stack.embed_dim, f"{side}.embed_dim", 1)
            if not stack.layers:
                raise SubnetError(f"{side}.layers is empty; at least one layer is needed")
            for i, layer in enumerate(stack.layers):
                self._check_layer(f"{side}.layers[{i}]", layer)

    def _check_layer(self, where: str, layer: EncoderLayer | DecoderLayer):
        names = ("heads",) if isinstance(layer, EncoderLayer) else ("self_heads", "cross_heads")
        for name in names:
            heads = getattr(layer, name)
            _check_int(heads, f"{where}.{name}", 1)
            if self.qkv_dim % heads:
                raise SubnetError(
                    f"{where}.{name} is {heads}, which does not divide qkv_dim {self.qkv_dim}; "
                    "use a divisor"
                )
        if not layer.experts:
            raise SubnetError(f"{where}.experts is empty; a dense layer has one entry")
        for j, size in enumerate(layer.experts):
            _check_int(size, f"{where}.experts[{j}]", 0)
        _check_int(layer.top_k, f"{where}.top_k", 1)
        if layer.top_k > len(layer.experts):
            raise SubnetError(
                f"{where}.top_k is {layer.top_k}, but the layer has {len(layer.experts)} "
                "expert(s); use at most that many"
            )
        if isinstance(layer, DecoderLayer):
            _check_int(layer.cross_span, f"{where}.cross_span", 1)
            if layer.cross_span > len(self.encoder.layers):
                raise SubnetError(
                    f"{where}.cross_span is {layer.cross_span}, but the encoder has "
                    f"{len(self.encoder.layers)} layer(s); use at most that many"
                )


def _check_int(value: Any, where: str, low: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        kind = "a positive integer" if low == 1 else f"an integer of at least {low}"
        raise SubnetError(f"{where} is {value!r}; it must be {kind}")


def to_json(subnet: Subnet) -> dict[str, Any]:
    """The JSON form (version 1). `top_k` is written where it is not 1."""

    def layer(spec: EncoderLayer | DecoderLayer) -> dict[str, Any]:
        fields = {k: list(v) if k == "experts" else v for k, v in vars(spec).items()}
        if fields["top_k"] == 1:
            del fields["top_k"]
        return fields

    def stack(spec: Encoder | Decoder) -> dict[str, Any]:
        return {"embed_dim": spec.embed_dim, "layers": [layer(x) for x in spec.layers]}

    return {
        "version": VERSION,
        "qkv_dim": subnet.qkv_dim,
        "encoder": stack(subnet.encoder),
        "decoder": stack(subnet.decoder),
    }


def from_json(obj: Any, default_qkv_dim: int = DEFAULT_QKV_DIM) -> Subnet:
    """The subnet of a JSON object.

    Args:
      obj: what `json.load` gave.
      default_qkv_dim: the width where `qkv_dim` is left out.

    Raises:
      SubnetError: names the field that is missing, unknown or wrong.
    """
    _check_fields(obj, "", {"encoder", "decoder"}, {"version", "qkv_dim"})
    if obj.get("version", VERSION) != VERSION:
        raise SubnetError(f"version is {obj['version']!r}; this program reads version {VERSION}")
    encoder, decoder = obj["encoder"], obj["decoder"]
    for side, stack in (("encoder", encoder), ("decoder", decoder)):
        _check_fields(stack, side, {"embed_dim", "layers"}, set())
        if not isinstance(stack["layers"], list):
            raise SubnetError(f"{side}.layers is {stack['layers']!r}; it must be a list of layers")
    return Subnet(
        qkv_dim=obj.get("qkv_dim", default_qkv_dim),
        encoder=Encoder(
            encoder["embed_dim"],
            tuple(
                _layer_from_json(EncoderLayer, x, f"encoder.layers[{i}]")
                for i, x in enumerate(encoder["layers"])
            ),
        ),
        decoder=Decoder(
            decoder["embed_dim"],
            tuple(
                _layer_from_json(DecoderLayer, x, f"decoder.layers[{i}]")
                for i, x in enumerate(decoder["layers"])
            ),
        ),
    )


def _layer_from_json(kind: type, obj: Any, where: str):
    fields = {f.name for f in dataclasses.fields(kind)}
    _check_fields(obj, where, fields - {"top_k"}, {"top_k"})
    if not isinstance(obj["experts"], list):
        raise SubnetError(
            f"{where}.experts is {obj['experts']!r}; it must be a list of FFN sizes, one per expert"
        )
    return kind(**{**obj, "experts": tuple(obj["experts"])})


def _check_fields(obj: Any, where: str, required: set[str], optional: set[str]):
    name = where or "the subnet"
    if not isinstance(obj, dict):
        raise SubnetError(f"{name} is {type(obj).__name__}; it must be a JSON object")
    prefix = f"{where}." if where else ""
    # Unknown ones first: a misspelt field is missing too.
    for key in sorted(map(str, obj.keys() - required - optional)):
        allowed = ", ".join(sorted(required | optional))
        raise SubnetError(f"{prefix}{key} is not a field of a subnet; allowed here: {allowed}")
    for key in sorted(required - obj.keys()):
        raise SubnetError(f"{prefix}{key} is missing")


def short_name(subnet: Subnet) -> str:
    """One line for tables: widths, and experts per layer, as `E512 1-1-2 D640 2-1`."""
    parts = []
    for letter, stack in (("E", subnet.encoder), ("D", subnet.decoder)):
        counts = "-".join(str(len(layer.experts)) for layer in stack.layers)
        parts.append(f"{letter}{stack.embed_dim} {counts}")
    return " ".join(parts)
