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
    """`params[path][place]` holds the rows `rows`, or their transpose, of the state dict's `key`.

    The path is empty where the params have no such array: the router over one expert.
    """

    key: str
    key_shape: Shape
    path: ParamPath
    shape: Shape
    rows: slice = _ALL
    place: slice | int = _ALL
    transposed: bool = False


def to_params(state: Mapping[str, np.ndarray], space: SearchSpace) -> tuple[Params, list[str]]:
    """The float32 params of the supernet of a space, and the names of arrays it does not use.

    The checkpoint must be the space's hull: the largest of every choice. Raises `CheckpointError`
    naming what is missing, left over, of another shape or not a finite number.
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
        _check_array(x.key, state[x.key], x.key_shape)
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

    In a stack with experts, a layer with one expert gets the router that the published code has.
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
    if source is not None and target is not None and not np.array_equal(source, target):
        raise CheckpointError(
            f"{TARGET} {target.shape} is not {SOURCE} {source.shape}, but "
            "space.share_embeddings is all; use --config.space.share_embeddings=decoder"
        )
    state.pop(TARGET, None)
    if source is None and target is not None:  # some files store a shared array once
        state[SOURCE] = target
    return state


def _check_names(state: State, needed: Iterable[str], known: set[str], space: SearchSpace):
    missing = [key for key in needed if key not in state]
    further = [key for key in state if key not in known and not _BUFFERS.fullmatch(key)]
    parts = [f"it lacks {_named(missing)}"] if missing else []
    parts += [f"the space has no place for {_named(further)}"] if further else []
    if parts:
        raise CheckpointError("; ".join(parts) + _sizes_hint(state, space))


def _sizes_hint(state: State, space: SearchSpace) -> str:
    """Widths, layers and experts of the checkpoint where the space has others."""
    found = []
    for stack, key in zip(space.stacks, (SOURCE, TARGET), strict=True):
        side = stack.side
        width = next(state[k] for k in (key, SOURCE, TARGET) if k in state).shape[1]
        layers = _numbers(state, rf"{side}\.layers\.(\d+)\.")
        experts = _numbers(state, rf"{side}\.layers\.\d+\.switch_layer\.experts\.(\d+)\.") or 1
        for text, size, field, largest in (
            (f"its {side} is {width} wide", width, "embed_dims", max(stack.embed_dims)),
            (f"it has {layers} {side} layers", layers, "depths", max(stack.depths)),
            (
                f"its {side} has {experts} expert(s) per layer",
                experts,
                "experts",
                stack.max_experts,
            ),
        ):
            if size and size != largest:
                found.append(f"{text}, space.{side}_{field} goes up to {largest}")
    return f" ({'; '.join(found)})" if found else ""


def _numbers(state: State, pattern: str) -> int:
    """One more than the largest number that the group of the pattern matches in a name."""
    found = (re.match(pattern, key) for key in state)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:_MAX_NAMED])
    more = len(keys) - _MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _check_array(key: str, array: np.ndarray, shape: Shape):
    if array.shape != shape:
        raise CheckpointError(
            f"{key} has the shape {array.shape}, the space needs {shape}; look at {_fields(key)}"
        )
    # By name: to NumPy, bfloat16 is no floating type.
    if "float" not in array.dtype.name:
        raise CheckpointError(f"{key} is of type {array.dtype}; weights are floating-point numbers")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise CheckpointError(f"{key} has values that are not finite numbers")


def _fields(key: str) -> str:
    """The fields of the space that decide the shape of an array."""
    side = key.split(".", maxsplit=1)[0]
    if "_attn." in key:
        return "space.qkv_dim and the embed_dims"
    if ".switch." in key:
        return f"space.{side}_experts and space.{side}_embed_dims"
    if re.search(r"\.(fc\d|experts\.\d+)\.", key):
        return f"space.{side}_ffn_dims and space.{side}_embed_dims"
    return f"space.{side}_embed_dims"


def _weight_maps(
    space: SearchSpace, vocab: tuple[int, int], moe: Mapping[str, bool]
) -> Iterator[WeightMap]:
    """All weights of the supernet of a space; `moe` says which stacks have expert layers."""
    hull, (source, target) = space.hull(), vocab
    d_e, d_d = hull.encoder.embed_dim, hull.decoder.embed_dim
    if space.share_embeddings == "all":
        yield _same(SOURCE, ("embedding", "table"), (source, max(d_e, d_d)))
    else:
        yield _same(SOURCE, ("source_embedding", "table"), (source, d_e))
        yield _same(TARGET, ("target_embedding", "table"), (target, d_d))
    if space.share_embeddings == "none":
        yield _same(OUTPUT, ("output", "table"), (target, d_d))
    for side, stack in hull.stacks:
        d = stack.embed_dim
        for i, layer in enumerate(stack.layers):
            key, path = f"{side}.layers.{i}", (side, f"layer_{i}")
            attentions = [("self_attn", "self_attention", d)]
            if isinstance(layer, DecoderLayer):
                attentions.append(("encoder_attn", "cross_attention", d_e))
            for theirs, ours, d_kv in attentions:
                yield from _attention(f"{key}.{theirs}", (*path, ours), d, d_kv, hull.qkv_dim)
                yield from _norm(f"{key}.{theirs}_layer_norm", (*path, f"{ours}_norm"), d)
            yield from _experts(key, (*path, "experts"), layer.experts, d, moe=moe[side])
            yield from _norm(f"{key}.final_layer_norm", (*path, "experts_norm"), d)


def _same(key: str, path: ParamPath, shape: Shape) -> WeightMap:
    """An array of the same shape in both."""
    return WeightMap(key, shape, path, shape)


def _matrix(key: str, path: ParamPath, d_in: int, d_out: int) -> WeightMap:
    return WeightMap(key, (d_out, d_in), path, (d_in, d_out), transposed=True)


def _norm(key: str, path: ParamPath, d: int) -> Iterator[WeightMap]:
    yield _same(f"{key}.weight", (*path, "scale"), (d,))
    yield _same(f"{key}.bias", (*path, "bias"), (d,))


def _attention(key: str, path: ParamPath, d_q: int, d_kv: int, q: int) -> Iterator[WeightMap]:
    """One attention of Q/K/V width `q`."""
    for i, (name, d) in enumerate((("query", d_q), ("key", d_kv), ("value", d_kv))):
        rows, kernel = slice(i * q, (i + 1) * q), (*path, name, "kernel")
        if d_q == d_kv:
            joint = f"{key}.in_proj_weight"
            yield WeightMap(joint, (3 * q, d), kernel, (d, q), rows, transposed=True)
        else:
            yield _matrix(f"{key}.{name[0]}_proj_weight", kernel, d, q)
        yield WeightMap(f"{key}.in_proj_bias", (3 * q,), (*path, name, "bias"), (q,), rows)
    yield _matrix(f"{key}.out_proj.weight", (*path, "out", "kernel"), q, d_q)
    yield _same(f"{key}.out_proj.bias", (*path, "out", "bias"), (d_q,))


def _experts(key: str, path: ParamPath, sizes: Shape, d: int, *, moe: bool) -> Iterator[WeightMap]:
    """Experts and router of a layer; all experts of a layer share one array here."""
    n, total = len(sizes), sum(sizes)
    starts = itertools.accumulate(sizes, initial=0)
    fc1, fc1_bias, fc2, fc2_bias = ((*path, x) for x in ("fc1", "fc1_bias", "fc2", "fc2_bias"))
    for e, (start, f) in enumerate(zip(starts, sizes, strict=False)):
        own, rows = f"{key}.switch_layer.experts.{e}", slice(start, start + f)
        one, two = (f"{own}.0", f"{own}.1") if moe else (f"{key}.fc1", f"{key}.fc2")
        yield WeightMap(f"{one}.weight", (f, d), fc1, (total, d), place=rows)
        yield WeightMap(f"{one}.bias", (f,), fc1_bias, (total,), place=rows)
        yield WeightMap(f"{two}.weight", (d, f), fc2, (total, d), place=rows, transposed=True)
        yield WeightMap(f"{two}.bias", (d,), fc2_bias, (n, d), place=e)
    if moe or n > 1:
        # With one expert the published code has a router and we have none.
        weight, bias = ((*path, "router"), (*path, "router_bias")) if n > 1 else ((), ())
        yield _matrix(f"{key}.switch_layer.switch.weight", weight, d, n)
        yield _same(f"{key}.switch_layer.switch.bias", bias, (n,))


def _nested(flat: dict[ParamPath, np.ndarray]) -> Params:
    params: Params = {}
    for path, array in flat.items():
        at = params
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = array
    return params
