"""Weights under the names of HAT's and AutoMoE's fairseq, to our params and back.

Names and layouts: github.com/microsoft/AutoMoE, fairseq/models/transformer_super.py and
fairseq/modules. Matrices are (out, in) there and (in, out) here; Q, K and V of one input are one
matrix there; the experts of a layer are one array here. Letters: D embedding, Q the Q/K/V width,
F FFN size, E experts, V vocabulary.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import DecoderLayer, EncoderLayer
from automoe_jax.model import stacked
from automoe_jax.model.extract import Params
from automoe_jax.system.errors import UserError

State = dict[str, np.ndarray]
Path = tuple[str, ...]

SOURCE, TARGET, OUTPUT = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.embed_out",
)
# What is in a state dict and no weight: versions, and buffers of the sinusoidal positions.
_BUFFERS = re.compile(r"(encoder|decoder)\.(version|embed_positions\.(_float_tensor|weights))")
_MOST_NAMED = 8
_ALL = slice(None)


class CheckpointError(UserError):
    """A checkpoint that is not the supernet that the space says."""


class Piece(NamedTuple):
    """`params[path][place]` is the rows `rows` of the array `key`, transposed or not."""

    key: str
    path: Path
    rows: slice = _ALL
    place: slice | int = _ALL
    transposed: bool = False


@dataclasses.dataclass
class Layout:
    """Where every array of a state dict goes.

    Attributes:
      keys: shape of each key, and the fields of the space that it comes from.
      arrays: shape of each array of the params.
      pieces: what goes where.
      unused: keys with a place in their code and none here: routers over one expert.
    """

    keys: dict[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict)
    arrays: dict[Path, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    unused: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def to_params(state: Mapping[str, np.ndarray], space: SearchSpace) -> tuple[Params, list[str]]:
    """The params of the supernet of a space.

    Args:
      state: arrays by name.
      space: whose hull the checkpoint must be: the largest of every choice.

    Returns:
      The params, float32, and the names that have no use here.

    Raises:
      CheckpointError: names what is missing, left over, of another shape or not a finite number.
    """
    state = _one_table(dict(state), space)
    sizes = vocab_sizes(state)
    layout = _layout(space, sizes, {side: _is_moe(state, side) for side in ("encoder", "decoder")})
    _check_names(state, layout, space)
    for key, (shape, fields) in layout.keys.items():
        _check_array(key, state[key], shape, fields)
    flat = {path: np.zeros(shape, np.float32) for path, shape in layout.arrays.items()}
    for piece in layout.pieces:
        rows = state[piece.key][piece.rows]
        flat[piece.path][piece.place] = rows.T if piece.transposed else rows
    ignored = [key for key in state if key not in layout.keys]
    params = _nested(flat)
    for side, experts in _experts_of(space).items():
        layers = [params[side][f"layer_{i}"] for i in range(len(experts))]
        params[side] = {stacked.LAYERS: stacked.join(layers, experts)}
    return params, sorted(ignored)


def from_params(params: Params, space: SearchSpace) -> State:
    """The state dict of a supernet: `to_params` backwards.

    A layer with one expert among layers with more gets the router that it has there, as zeros: its
    one probability is 1.

    Args:
      params: of the supernet of `space`.
      space: the search space.
    """
    names = (
        ("embedding",) * 2 if "embedding" in params else ("source_embedding", "target_embedding")
    )
    source, target = (params[name]["table"].shape[0] for name in names)
    moe = {side: getattr(space, side).max_experts > 1 for side in ("encoder", "decoder")}
    layout = _layout(space, (source, target), moe)
    params = {
        **params,
        **{s: stacked.per_layer(params[s], experts) for s, experts in _experts_of(space).items()},
    }
    state = {key: np.zeros(shape, np.float32) for key, (shape, _) in layout.keys.items()}
    for piece in layout.pieces:
        array = params
        for name in piece.path:
            array = array[name]
        rows = np.asarray(array, np.float32)[piece.place]
        state[piece.key][piece.rows] = rows.T if piece.transposed else rows
    state |= {key: np.zeros(shape, np.float32) for key, shape in layout.unused.items()}
    if space.share_embeddings == "all":
        state[TARGET] = state[SOURCE]
    return state


def _experts_of(space: SearchSpace) -> dict[str, list[tuple[int, ...]]]:
    hull = space.hull()
    return {
        side: [layer.experts for layer in getattr(hull, side).layers]
        for side in ("encoder", "decoder")
    }


def vocab_sizes(state: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Rows of the source's and the target's table; `CheckpointError` where there is none."""
    tables = [state.get(key) for key in (SOURCE, TARGET)]
    source, target = (t if t is not None else o for t, o in zip(tables, tables[::-1], strict=True))
    if source is None or target is None or source.ndim != 2 or target.ndim != 2:
        found = f"it has {_named(sorted(state)[:3])}" if state else "it is empty"
        raise CheckpointError(
            f"{SOURCE} is missing or not a table ({found}); is this the state dict of a fairseq "
            "model?"
        )
    return source.shape[0], target.shape[0]


def _one_table(state: State, space: SearchSpace) -> State:
    """The state with the second name of a shared table left out; checks who shares with whom."""
    shared = space.share_embeddings
    source, target = state.get(SOURCE), state.get(TARGET)
    if (OUTPUT in state) != (shared == "none"):
        apart = "has an output layer of its own" if OUTPUT in state else "has no output layer"
        same = source is None or target is None or np.array_equal(source, target)
        fitting = "none" if OUTPUT in state else "all" if same else "decoder"
        raise CheckpointError(
            f"it {apart} ({OUTPUT}), but space.share_embeddings is {shared}; use "
            f"--config.space.share_embeddings={fitting}"
        )
    if shared != "all":
        return state
    if source is None and target is not None:  # some files hold a shared array once
        state[SOURCE] = state.pop(TARGET)
    elif target is not None and source is not None:
        if source.shape != target.shape or not np.array_equal(source, target):
            raise CheckpointError(
                f"{TARGET} {target.shape} is not {SOURCE} {source.shape}, but "
                "space.share_embeddings is all; use --config.space.share_embeddings=decoder"
            )
        del state[TARGET]
    return state


def _is_moe(state: Mapping[str, np.ndarray], side: str) -> bool:
    return any(key.startswith(f"{side}.layers.") and ".switch_layer." in key for key in state)


# --- checks ------------------------------------------------------------------------------------


def _check_names(state: State, layout: Layout, space: SearchSpace):
    missing = [key for key in layout.keys if key not in state]
    known = layout.keys.keys() | layout.unused.keys()
    further = [key for key in state if key not in known and not _BUFFERS.fullmatch(key)]
    if not missing and not further:
        return
    parts = []
    if missing:
        parts.append(f"it lacks {_named(missing)}")
    if further:
        parts.append(f"the space has no place for {_named(further)}")
    raise CheckpointError("; ".join(parts) + _sizes_hint(state, space))


def _sizes_hint(state: State, space: SearchSpace) -> str:
    """Widths, layers and experts of the checkpoint where the space has others."""
    found = []
    for side, key in (("encoder", SOURCE), ("decoder", TARGET)):
        table = next(state[k] for k in (key, SOURCE, TARGET) if k in state)
        width = table.shape[1]
        if width != max(getattr(space, f"{side}_embed_dims")):
            found.append(
                f"its {side} is {width} wide, space.{side}_embed_dims goes up to "
                f"{max(getattr(space, f'{side}_embed_dims'))}"
            )
        layers = _numbers(state, rf"{side}\.layers\.(\d+)\.")
        if layers and layers != max(getattr(space, f"{side}_depths")):
            found.append(
                f"it has {layers} {side} layers, space.{side}_depths goes up to "
                f"{max(getattr(space, f'{side}_depths'))}"
            )
        experts = _numbers(state, rf"{side}\.layers\.\d+\.switch_layer\.experts\.(\d+)\.")
        if max(experts, 1) != getattr(space, side).max_experts:
            found.append(
                f"its {side} has {max(experts, 1)} expert(s) per layer, space.{side}_experts goes "
                f"up to {getattr(space, side).max_experts}"
            )
    return f" ({'; '.join(found)})" if found else ""


def _numbers(state: State, pattern: str) -> int:
    """One more than the largest number that a name has at the place of the group."""
    found = (re.match(pattern, key) for key in state)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:_MOST_NAMED])
    more = len(keys) - _MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _check_array(key: str, array: np.ndarray, shape: tuple[int, ...], fields: str):
    if array.shape != shape:
        raise CheckpointError(
            f"{key} has the shape {array.shape}, the space needs {shape}; look at {fields}"
        )
    # By name: bfloat16 is no floating type of NumPy's own.
    if "float" not in array.dtype.name:
        raise CheckpointError(f"{key} is of type {array.dtype}; weights are floating-point numbers")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise CheckpointError(f"{key} has values that are not finite numbers")


# --- the layout --------------------------------------------------------------------------------


def _layout(space: SearchSpace, sizes: tuple[int, int], moe: Mapping[str, bool]) -> Layout:
    """Keys and arrays of the supernet of a space; `moe` says which stacks have expert layers."""
    hull, layout = space.hull(), Layout()
    d_e, d_d = hull.encoder.embed_dim, hull.decoder.embed_dim
    source, target = sizes
    e_field, d_field = "space.encoder_embed_dims", "space.decoder_embed_dims"
    if space.share_embeddings == "all":
        _array(layout, SOURCE, ("embedding", "table"), (source, max(d_e, d_d)), e_field)
    else:
        _array(layout, SOURCE, ("source_embedding", "table"), (source, d_e), e_field)
        _array(layout, TARGET, ("target_embedding", "table"), (target, d_d), d_field)
    if space.share_embeddings == "none":
        _array(layout, OUTPUT, ("output", "table"), (target, d_d), d_field)
    for side, stack in (("encoder", hull.encoder), ("decoder", hull.decoder)):
        for i, layer in enumerate(stack.layers):
            key, path = f"{side}.layers.{i}", (side, f"layer_{i}")
            d, field = (d_e, e_field) if side == "encoder" else (d_d, d_field)
            _attention(layout, f"{key}.self_attn", (*path, "self_attention"), d, d, hull.qkv_dim)
            _norm(layout, f"{key}.self_attn_layer_norm", (*path, "self_attention_norm"), d, field)
            if isinstance(layer, DecoderLayer):
                cross = (*path, "cross_attention")
                _attention(layout, f"{key}.encoder_attn", cross, d, d_e, hull.qkv_dim)
                norm = (*path, "cross_attention_norm")
                _norm(layout, f"{key}.encoder_attn_layer_norm", norm, d, field)
            _experts(layout, key, (*path, "experts"), layer, d, moe[side])
            _norm(layout, f"{key}.final_layer_norm", (*path, "experts_norm"), d, field)
    return layout


def _array(layout: Layout, key: str, path: Path, shape: tuple[int, ...], fields: str):
    """An array that is the same in both."""
    layout.keys[key] = (shape, fields)
    layout.arrays[path] = shape
    layout.pieces.append(Piece(key, path))


def _norm(layout: Layout, key: str, path: Path, d: int, field: str):
    _array(layout, f"{key}.weight", (*path, "scale"), (d,), field)
    _array(layout, f"{key}.bias", (*path, "bias"), (d,), field)


def _attention(layout: Layout, key: str, path: Path, d_q: int, d_kv: int, qkv_dim: int):
    fields = "space.qkv_dim and the embed_dims"
    parts = (("query", d_q), ("key", d_kv), ("value", d_kv))
    for i, (name, d) in enumerate(parts):
        third = slice(i * qkv_dim, (i + 1) * qkv_dim)
        kernel, bias = (*path, name, "kernel"), (*path, name, "bias")
        layout.arrays[kernel], layout.arrays[bias] = (d, qkv_dim), (qkv_dim,)
        if d_q == d_kv:
            layout.keys[f"{key}.in_proj_weight"] = (3 * qkv_dim, d), fields
            piece = Piece(f"{key}.in_proj_weight", kernel, third, transposed=True)
        else:
            own = f"{key}.{name[0]}_proj_weight"
            layout.keys[own] = (qkv_dim, d), fields
            piece = Piece(own, kernel, transposed=True)
        layout.pieces += [piece, Piece(f"{key}.in_proj_bias", bias, third)]
    layout.keys[f"{key}.in_proj_bias"] = (3 * qkv_dim,), fields
    _linear(layout, f"{key}.out_proj", (*path, "out"), qkv_dim, d_q, fields)


def _linear(layout: Layout, key: str, path: Path, d_in: int, d_out: int, fields: str):
    layout.keys[f"{key}.weight"] = (d_out, d_in), fields
    layout.arrays[(*path, "kernel")] = (d_in, d_out)
    layout.pieces.append(Piece(f"{key}.weight", (*path, "kernel"), transposed=True))
    _array(layout, f"{key}.bias", (*path, "bias"), (d_out,), fields)


def _experts(
    layout: Layout, key: str, path: Path, layer: EncoderLayer | DecoderLayer, d: int, moe: bool
):
    side = key.split(".", maxsplit=1)[0]
    fields = f"space.{side}_ffn_dims and space.{side}_embed_dims"
    sizes, n = layer.experts, len(layer.experts)
    layout.arrays |= {
        (*path, "fc1"): (sum(sizes), d),
        (*path, "fc1_bias"): (sum(sizes),),
        (*path, "fc2"): (sum(sizes), d),
        (*path, "fc2_bias"): (n, d),
    }
    for e, start, size in _starts(sizes):
        rows = slice(start, start + size)
        own = f"{key}.switch_layer.experts.{e}"
        fc1, fc2 = (f"{own}.0", f"{own}.1") if moe else (f"{key}.fc1", f"{key}.fc2")
        layout.keys |= {
            f"{fc1}.weight": ((size, d), fields),
            f"{fc1}.bias": ((size,), fields),
            f"{fc2}.weight": ((d, size), fields),
            f"{fc2}.bias": ((d,), fields),
        }
        layout.pieces += [
            Piece(f"{fc1}.weight", (*path, "fc1"), place=rows),
            Piece(f"{fc1}.bias", (*path, "fc1_bias"), place=rows),
            Piece(f"{fc2}.weight", (*path, "fc2"), place=rows, transposed=True),
            Piece(f"{fc2}.bias", (*path, "fc2_bias"), place=e),
        ]
    router = f"{key}.switch_layer.switch"
    if n > 1:
        fields = f"space.{side}_experts and space.{side}_embed_dims"
        layout.keys[f"{router}.weight"] = (n, d), fields
        layout.arrays[(*path, "router")] = (d, n)
        layout.pieces.append(Piece(f"{router}.weight", (*path, "router"), transposed=True))
        _array(layout, f"{router}.bias", (*path, "router_bias"), (n,), fields)
    elif moe:
        layout.unused |= {f"{router}.weight": (1, d), f"{router}.bias": (1,)}


def _starts(sizes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(number, first row, size) of each expert."""
    start = 0
    for e, size in enumerate(sizes):
        yield e, start, size
        start += size


def _nested(flat: dict[Path, np.ndarray]) -> Params:
    params: Params = {}
    for path, array in flat.items():
        at = params
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = array
    return params
