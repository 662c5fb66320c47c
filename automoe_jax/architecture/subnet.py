"""`Subnet`: one architecture, as a frozen dataclass and as JSON."""

import dataclasses
from typing import Any, ClassVar

from automoe_jax.system.errors import UserError

VERSION = 1
DEFAULT_QKV_DIM = 512
# What layers are: the Transformer's, or the cells of the Evolved Transformer (`model.evolved`).
CELLS = ("transformer", "evolved")
# An evolved decoder cell doubles the heads of its first self-attention up to this number.
MOST_DOUBLED_HEADS = 16


class SubnetError(UserError):
    """An impossible architecture, or a file without one."""


@dataclasses.dataclass(frozen=True)
class EncoderLayer:
    """`experts` holds the FFN size of each expert: one entry is a dense FFN, 0 an identity."""

    HEADS: ClassVar = ("heads",)  # fields that count attention heads; the first: self-attention's

    heads: int
    experts: tuple[int, ...]
    top_k: int = 1


@dataclasses.dataclass(frozen=True)
class DecoderLayer:
    """As `EncoderLayer`; the cross-attention attends to the last `cross_span` encoder layers."""

    HEADS: ClassVar = ("self_heads", "cross_heads")

    self_heads: int
    cross_heads: int
    cross_span: int
    experts: tuple[int, ...]
    top_k: int = 1


LayerSpec = EncoderLayer | DecoderLayer


@dataclasses.dataclass(frozen=True)
class Encoder:
    layer_type: ClassVar = EncoderLayer

    embed_dim: int
    layers: tuple[EncoderLayer, ...]


@dataclasses.dataclass(frozen=True)
class Decoder:
    layer_type: ClassVar = DecoderLayer

    embed_dim: int
    layers: tuple[DecoderLayer, ...]


# The stacks of a subnet, by field name.
STACKS = {"encoder": Encoder, "decoder": Decoder}


@dataclasses.dataclass(frozen=True)
class Subnet:
    """One architecture. Hashable, so that it can key a cache.

    Raises `SubnetError` if a size is not a positive integer, heads do not divide `qkv_dim`, a
    cross-attention span is longer than the encoder, or `top_k` exceeds the experts. Evolved cells
    have even widths, one FFN, and attend to the end of the encoder.
    """

    encoder: Encoder
    decoder: Decoder
    qkv_dim: int = DEFAULT_QKV_DIM
    cell: str = CELLS[0]

    def __post_init__(self):
        if self.cell not in CELLS:
            raise SubnetError(f"cell is {self.cell!r}; allowed: {', '.join(CELLS)}")
        _check_int(self.qkv_dim, "qkv_dim", 1)
        for side, stack in self.stacks:
            _check_int(stack.embed_dim, f"{side}.embed_dim", 1)
            if not stack.layers:
                raise SubnetError(f"{side}.layers is empty; at least one layer is needed")
            for i, layer in enumerate(stack.layers):
                self._check_layer(f"{side}.layers[{i}]", layer)
                if self.cell == "evolved":
                    self._check_evolved(f"{side}.layers[{i}]", layer)
            if self.cell == "evolved" and stack.embed_dim % 2:
                raise SubnetError(
                    f"{side}.embed_dim is {stack.embed_dim}; evolved cells need an even one"
                )

    @property
    def stacks(self) -> tuple[tuple[str, Encoder], tuple[str, Decoder]]:
        """("encoder", its stack) and ("decoder", its stack)."""
        return ("encoder", self.encoder), ("decoder", self.decoder)

    @property
    def layers(self) -> tuple[tuple[str, int, LayerSpec], ...]:
        """Each layer, encoder first, with its side and its number in the stack from 1."""
        return tuple(
            (side, number, layer)
            for side, stack in self.stacks
            for number, layer in enumerate(stack.layers, 1)
        )

    def _check_layer(self, where: str, layer: LayerSpec):
        for name in layer.HEADS:
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

    def _check_evolved(self, where: str, layer: LayerSpec):
        if len(layer.experts) != 1 or 0 in layer.experts:
            raise SubnetError(f"{where}.experts is {layer.experts}; an evolved cell has one FFN")
        if not isinstance(layer, DecoderLayer):
            return
        if layer.cross_span > 1:
            raise SubnetError(f"{where}.cross_span is {layer.cross_span}; 1 in evolved cells")
        doubled = doubled_heads(layer.self_heads)
        if self.qkv_dim % doubled:
            raise SubnetError(
                f"{where}.self_heads is {layer.self_heads}, and an evolved cell also has attention "
                f"of {doubled} heads, which do not divide qkv_dim {self.qkv_dim}"
            )


def doubled_heads(heads: int) -> int:
    """Heads of the first self-attention of an evolved decoder cell, by those of the second."""
    return max(heads, min(2 * heads, MOST_DOUBLED_HEADS))


def _check_int(value: Any, where: str, low: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        kind = "a positive integer" if low == 1 else f"an integer of at least {low}"
        raise SubnetError(f"{where} is {value!r}; it must be {kind}")


def to_json(subnet: Subnet) -> dict[str, Any]:
    """The JSON form (version 1). `top_k` is written where it is not 1, so is an evolved `cell`."""

    def layer_json(layer: LayerSpec) -> dict[str, Any]:
        fields = {**vars(layer), "experts": list(layer.experts)}
        if layer.top_k == 1:
            del fields["top_k"]
        return fields

    stacks = {
        side: {"embed_dim": stack.embed_dim, "layers": [layer_json(x) for x in stack.layers]}
        for side, stack in subnet.stacks
    }
    cell = {} if subnet.cell == CELLS[0] else {"cell": subnet.cell}
    return {"version": VERSION, "qkv_dim": subnet.qkv_dim, **cell, **stacks}


def from_json(obj: Any, default_qkv_dim: int = DEFAULT_QKV_DIM) -> Subnet:
    """The subnet of a JSON object; `SubnetError` names a missing, unknown or wrong field."""
    _check_fields(obj, "", set(STACKS), {"version", "qkv_dim", "cell"})
    if obj.get("version", VERSION) != VERSION:
        raise SubnetError(f"version is {obj['version']!r}; this program reads version {VERSION}")
    stacks = {}
    for side, stack_type in STACKS.items():
        stack = obj[side]
        _check_fields(stack, side, {"embed_dim", "layers"}, set())
        if not isinstance(stack["layers"], list):
            raise SubnetError(f"{side}.layers is {stack['layers']!r}; it must be a list of layers")
        layers = tuple(
            _layer_from_json(stack_type.layer_type, layer, f"{side}.layers[{i}]")
            for i, layer in enumerate(stack["layers"])
        )
        stacks[side] = stack_type(stack["embed_dim"], layers)
    qkv_dim = obj.get("qkv_dim", default_qkv_dim)
    return Subnet(qkv_dim=qkv_dim, cell=obj.get("cell", CELLS[0]), **stacks)


def _layer_from_json(layer_type: type, obj: Any, where: str):
    fields = {f.name for f in dataclasses.fields(layer_type)}
    _check_fields(obj, where, fields - {"top_k"}, {"top_k"})
    if not isinstance(obj["experts"], list):
        raise SubnetError(
            f"{where}.experts is {obj['experts']!r}; it must be a list of FFN sizes, one per expert"
        )
    return layer_type(**{**obj, "experts": tuple(obj["experts"])})


def _check_fields(obj: Any, where: str, required: set[str], optional: set[str]):
    name = where or "the subnet"
    if not isinstance(obj, dict):
        raise SubnetError(f"{name} is {type(obj).__name__}; it must be a JSON object")
    prefix = f"{where}." if where else ""
    # Unknown fields first: a misspelt field is also a missing one.
    for key in sorted(map(str, obj.keys() - required - optional)):
        allowed = ", ".join(sorted(required | optional))
        raise SubnetError(f"{prefix}{key} is not a field of a subnet; allowed here: {allowed}")
    for key in sorted(required - obj.keys()):
        raise SubnetError(f"{prefix}{key} is missing")


def short_name(subnet: Subnet) -> str:
    """One line for tables: widths, and experts per layer, as `E512 1-1-2 D640 2-1`."""
    return " ".join(
        f"{side[0].upper()}{stack.embed_dim} {'-'.join(str(len(x.experts)) for x in stack.layers)}"
        for side, stack in subnet.stacks
    ) + (" evolved" if subnet.cell == "evolved" else "")
