"""Weights under the names of HAT's and AutoMoE's fairseq, to our params and back.

Names and shapes: github.com/microsoft/AutoMoE, fairseq/models/transformer_super.py and
fairseq/modules. Matrices are (out, in) there and (in, out) here; Q, K and V of one input are one
matrix there; the experts of a layer are one array here.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import STACKS, DecoderLayer
from automoe_jax.model import stacked
from automoe_jax.model.extract import Params
from automoe_jax.system.errors import UserError

State = dict[str, np.ndarray]
Shape = tuple[int, ...]
ParamPath = tuple[str, ...]

SOURCE, TARGET, OUTPUT = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.embed_out",
)
# Entries of a state dict that are no weights: versions and buffers of the sinusoidal positions.
_BUFFERS = re.compile(r"(encoder|decoder)\.(version|embed_positions\.(_float_tensor|weights))")
_MAX_NAMED = 8
_ALL = slice(None)


class CheckpointError(UserError):
    """A checkpoint that does not fit the supernet of the space."""


class WeightMap(NamedTuple):
    """`params[path][place]` holds the rows `rows` of the state dict's array `key`.

    Attributes:
      key, key_shape: the array of the state dict.
      path, shape: the array of the params; the path is empty where the params have no such array
        (the router over one expert, which the published code has).
      fields: the fields of the space that decide the shape, for error lines.
      transposed: whether the rows are transposed on the way.
    """

    key: str
    key_shape: Shape
    path: ParamPath
    shape: Shape
    fields: str
    rows: slice = _ALL
    place: slice | int = _ALL
    transposed: bool = False


def to_params(state: Mapping[str, np.ndarray], space: SearchSpace) -> tuple[Params, list[str]]:
    """The params of the supernet of a space.

    Args:
      state: arrays by name.
      space: whose hull the checkpoint must be: the largest of every choice.

    Returns:
      The params, float32, and the names of arrays that the supernet does not use.

    Raises:
      CheckpointError: names what is missing, left over, of another shape or not a finite number.
    """
    state = _one_table(dict(state), space)
    moe = {
        side: any(x.startswith(f"{side}.layers.") and ".switch_layer." in x for x in state)
        for side in STACKS
    }
    maps = list(_weight_maps(space, vocab_sizes(state), moe))
    used = [x for x in maps if x.path]
    needed = {x.key: x for x in used}
    _check_names(state, needed.keys(), {x.key for x in maps}, space)
    for x in needed.values():
        _check_array(state[x.key], x)
    flat = {x.path: np.zeros(x.shape, np.float32) for x in used}
    for x in used:
        rows = state[x.key][x.rows]
        flat[x.path][x.place] = rows.T if x.transposed else rows
    params = _nested(flat)
    for side, experts in _hull_experts(space).items():
        layers = [params[side][f"layer_{i}"] for i in range(len(experts))]
        params[side] = {stacked.LAYERS: stacked.join(layers, experts)}
    return params, sorted(state.keys() - needed.keys())


def from_params(params: Params, space: SearchSpace) -> State:
    """The state dict of a supernet: the inverse of `to_params`.

    In a stack with experts, a layer with one expert gets a router of zeros, as the published code
    has one there: its single probability is 1.

    Args:
      params: of the supernet of `space`.
      space: the search space.
    """
    source, target = (
        params["embedding" if "embedding" in params else name]["table"].shape[0]
        for name in ("source_embedding", "target_embedding")
    )
    moe = {stack.side: stack.max_experts > 1 for stack in space.stacks}
    layers = {s: stacked.per_layer(params[s], x) for s, x in _hull_experts(space).items()}
    params, state = {**params, **layers}, {}
    for x in _weight_maps(space, (source, target), moe):
        found = state.setdefault(x.key, np.zeros(x.key_shape, np.float32))
        if x.path:
            array = params
            for name in x.path:
                array = array[name]
            rows = np.asarray(array, np.float32)[x.place]
            found[x.rows] = rows.T if x.transposed else rows
    if space.share_embeddings == "all":
        state[TARGET] = state[SOURCE]
    return state


def _hull_experts(space: SearchSpace) -> dict[str, list[tuple[int, ...]]]:
    """FFN sizes of the supernet's experts, by stack and layer."""
    return {side: [x.experts for x in stack.layers] for side, stack in space.hull().stacks}


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
    """The state without the second name of a shared table; checks which tables are shared."""
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
    if source is None and target is not None:  # some files store a shared array once
        state[SOURCE] = state.pop(TARGET)
    elif target is not None and source is not None:
        if source.shape != target.shape or not np.array_equal(source, target):
            raise CheckpointError(
                f"{TARGET} {target.shape} is not {SOURCE} {source.shape}, but "
                "space.share_embeddings is all; use --config.space.share_embeddings=decoder"
            )
        del state[TARGET]
    return state


def _check_names(state: State, needed: Iterable[str], known: set[str], space: SearchSpace):
    missing = [key for key in needed if key not in state]
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
    for stack, key in zip(space.stacks, (SOURCE, TARGET), strict=True):
        side = stack.side
        width = next(state[k] for k in (key, SOURCE, TARGET) if k in state).shape[1]
        if width != max(stack.embed_dims):
            found.append(
                f"its {side} is {width} wide, space.{side}_embed_dims goes up to "
                f"{max(stack.embed_dims)}"
            )
        layers = _numbers(state, rf"{side}\.layers\.(\d+)\.")
        if layers and layers != max(stack.depths):
            found.append(
                f"it has {layers} {side} layers, space.{side}_depths goes up to {max(stack.depths)}"
            )
        experts = _numbers(state, rf"{side}\.layers\.\d+\.switch_layer\.experts\.(\d+)\.")
        if max(experts, 1) != stack.max_experts:
            found.append(
                f"its {side} has {max(experts, 1)} expert(s) per layer, space.{side}_experts goes "
                f"up to {stack.max_experts}"
            )
    return f" ({'; '.join(found)})" if found else ""


def _numbers(state: State, pattern: str) -> int:
    """One more than the largest number that the group of the pattern matches in a name."""
    found = (re.match(pattern, key) for key in state)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:_MAX_NAMED])
    more = len(keys) - _MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _check_array(array: np.ndarray, expected: WeightMap):
    key, shape = expected.key, expected.key_shape
    if array.shape != shape:
        raise CheckpointError(
            f"{key} has the shape {array.shape}, the space needs {shape}; look at {expected.fields}"
        )
    # By name: to NumPy, bfloat16 is no floating type.
    if "float" not in array.dtype.name:
        raise CheckpointError(f"{key} is of type {array.dtype}; weights are floating-point numbers")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise CheckpointError(f"{key} has values that are not finite numbers")


def _weight_maps(
    space: SearchSpace, vocab: tuple[int, int], moe: Mapping[str, bool]
) -> Iterator[WeightMap]:
    """All weights of the supernet of a space; `moe` says which stacks have expert layers."""
    hull, (source, target) = space.hull(), vocab
    d_e, d_d = hull.encoder.embed_dim, hull.decoder.embed_dim
    fields = {side: f"space.{side}_embed_dims" for side in STACKS}
    if space.share_embeddings == "all":
        table = (source, max(d_e, d_d))
        yield _same(SOURCE, ("embedding", "table"), table, fields["encoder"])
    else:
        yield _same(SOURCE, ("source_embedding", "table"), (source, d_e), fields["encoder"])
        yield _same(TARGET, ("target_embedding", "table"), (target, d_d), fields["decoder"])
    if space.share_embeddings == "none":
        yield _same(OUTPUT, ("output", "table"), (target, d_d), fields["decoder"])
    for side, stack in hull.stacks:
        d, q, field = stack.embed_dim, hull.qkv_dim, fields[side]
        for i, layer in enumerate(stack.layers):
            key, path = f"{side}.layers.{i}", (side, f"layer_{i}")
            attentions = [("self_attn", "self_attention", d)]
            if isinstance(layer, DecoderLayer):
                attentions.append(("encoder_attn", "cross_attention", d_e))
            for theirs, ours, d_kv in attentions:
                yield from _attention(f"{key}.{theirs}", (*path, ours), d, d_kv, q)
                yield from _norm(f"{key}.{theirs}_layer_norm", (*path, f"{ours}_norm"), d, field)
            names = f"space.{side}_{{}} and {field}"
            experts = (*path, "experts")
            yield from _experts(key, experts, layer.experts, d, names, moe=moe[side])
            if moe[side] or len(layer.experts) > 1:
                router = f"{key}.switch_layer.switch"
                yield from _router(router, experts, len(layer.experts), d, names)
            yield from _norm(f"{key}.final_layer_norm", (*path, "experts_norm"), d, field)


def _same(key: str, path: ParamPath, shape: Shape, fields: str) -> WeightMap:
    """An array of the same shape in both."""
    return WeightMap(key, shape, path, shape, fields)


def _norm(key: str, path: ParamPath, d: int, field: str) -> Iterator[WeightMap]:
    yield _same(f"{key}.weight", (*path, "scale"), (d,), field)
    yield _same(f"{key}.bias", (*path, "bias"), (d,), field)


def _matrix(key: str, path: ParamPath, d_in: int, d_out: int, fields: str) -> WeightMap:
    return WeightMap(key, (d_out, d_in), path, (d_in, d_out), fields, transposed=True)


def _attention(key: str, path: ParamPath, d_q: int, d_kv: int, q: int) -> Iterator[WeightMap]:
    """One attention of Q/K/V width `q`."""
    fields = "space.qkv_dim and the embed_dims"
    for i, (name, d) in enumerate((("query", d_q), ("key", d_kv), ("value", d_kv))):
        rows, kernel = slice(i * q, (i + 1) * q), (*path, name, "kernel")
        if d_q == d_kv:
            shape = (3 * q, d)
            yield WeightMap(
                f"{key}.in_proj_weight", shape, kernel, (d, q), fields, rows, transposed=True
            )
        else:
            yield _matrix(f"{key}.{name[0]}_proj_weight", kernel, d, q, fields)
        bias = (*path, name, "bias")
        yield WeightMap(f"{key}.in_proj_bias", (3 * q,), bias, (q,), fields, rows)
    yield _matrix(f"{key}.out_proj.weight", (*path, "out", "kernel"), q, d_q, fields)
    yield _same(f"{key}.out_proj.bias", (*path, "out", "bias"), (d_q,), fields)


def _experts(
    key: str, path: ParamPath, sizes: Shape, d: int, names: str, *, moe: bool
) -> Iterator[WeightMap]:
    """The FFNs of a layer: each expert is a slice of the rows of one array here."""
    fields, total = names.format("ffn_dims"), sum(sizes)
    starts = itertools.accumulate(sizes, initial=0)
    for e, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        own, place = f"{key}.switch_layer.experts.{e}", slice(start, start + size)
        fc1, fc2 = (f"{own}.0", f"{own}.1") if moe else (f"{key}.fc1", f"{key}.fc2")
        for name, key_shape, param, shape, at in (
            (f"{fc1}.weight", (size, d), "fc1", (total, d), place),
            (f"{fc1}.bias", (size,), "fc1_bias", (total,), place),
            (f"{fc2}.weight", (d, size), "fc2", (total, d), place),
            (f"{fc2}.bias", (d,), "fc2_bias", (len(sizes), d), e),
        ):
            transposed = param == "fc2"
            yield WeightMap(
                name, key_shape, (*path, param), shape, fields, place=at, transposed=transposed
            )


def _router(key: str, path: ParamPath, n: int, d: int, names: str) -> Iterator[WeightMap]:
    """The router over `n` experts."""
    fields = names.format("experts")
    weight, bias = ((*path, "router"), (*path, "router_bias")) if n > 1 else ((), ())
    yield _matrix(f"{key}.weight", weight, d, n, fields)
    yield _same(f"{key}.bias", bias, (n,), fields)


def _nested(flat: dict[ParamPath, np.ndarray]) -> Params:
    params: Params = {}
    for path, array in flat.items():
        at = params
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = array
    return params
