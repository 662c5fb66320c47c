"""FLOPs, memory traffic and messages of a compiled program, counted in its text.

XLA's own analysis counts the body of a loop once, however often it runs. Here it counts as often as
it runs, where that is a constant or the caller knows it. Memory is the device's large one: what the
compiler keeps in a core's own memory is not counted.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet

import numpy as np

from automoe_jax.system import hlo_text
from automoe_jax.system.hlo_text import Computation, Instruction, n_bytes

# How often a loop runs, by the name of its operation; None where the caller does not know.
Trips = Callable[[str], int | None]

# Operations that compute and move nothing.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-update", "domain",
}  # fmt: skip
# "Custom calls" that tell the compiler something.
_MARKERS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "TopK", "Sharding"}
_MOVES = {
    "copy", "copy-start", "slice", "slice-start", "reshape", "transpose", "broadcast", "iota",
    "concatenate", "dynamic-slice", "dynamic-update-slice", "gather", "pad", "reverse",
    "bitcast-convert", "convert", "all-gather", "all-to-all", "ragged-all-to-all",
    "collective-permute",
}  # fmt: skip
# Bytes that each of n devices sends, for a byte of the operation's result.
_SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: float(n - 1),  # the result is an n-th of the data
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one run of a program on one device."""

    flops: float = 0.0
    memory_bytes: float = 0.0  # read and written
    sent: Counter[str] = dataclasses.field(default_factory=Counter)  # bytes, by collective
    unknown_loops: int = 0  # loops that count once, as nobody knows how often they run
    unknown_kernels: int = 0  # kernels that do not say what they compute

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.flops + other.flops,
            self.memory_bytes + other.memory_bytes,
            self.sent + other.sent,
            self.unknown_loops + other.unknown_loops,
            self.unknown_kernels + other.unknown_kernels,
        )

    def times(self, n: int) -> "Costs":
        """Those of `n` runs."""
        if not n:
            return Costs()
        sent = Counter({name: n * size for name, size in self.sent.items()})
        return dataclasses.replace(
            self, flops=n * self.flops, memory_bytes=n * self.memory_bytes, sent=sent
        )


def costs(text: str, trips: Trips = lambda name: None) -> Costs:
    """The costs of a program from `Compiled.as_text()`; `ValueError` if it cannot be read."""
    computations, entry = hlo_text.parse(text)
    found = re.search(r"^HloModule .*\b(?:num_partitions|replica_count)=(\d+)", text)
    return _Counting(computations, trips, int(found[1]) if found else 1).of(entry)


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a program, those inside fusions included."""
    for computation in hlo_text.parse(text)[0].values():
        yield from computation.values()


def _total(parts: Iterable[Costs]) -> Costs:
    return functools.reduce(Costs.__add__, parts, Costs())


class _Counting:
    """Costs of computations, each counted once."""

    def __init__(self, computations: dict[str, Computation], trips: Trips, n_devices: int):
        self._computations, self._trips, self._n_devices = computations, trips, n_devices
        self._known: dict[str, Costs] = {}

    def of(self, name: str) -> Costs:
        """The costs of one run of a computation."""
        if name not in self._known:
            own = self._computations[name]
            self._known[name] = _total(self._instruction(one, own) for one in own.values())
        return self._known[name]

    def _instruction(self, one: Instruction, own: Computation) -> Costs:
        opcode = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            return Costs()
        if opcode == "while":
            once, n = _total(map(self.of, one.called)), self._runs(one)
            unknown = dataclasses.replace(once, unknown_loops=once.unknown_loops + 1)
            return unknown if n is None else once.times(n)
        if opcode == "conditional":
            # What the compiler makes of a loop of one round at most, or a choice: of what is not
            # known, the costliest.
            pick = min if self._trips(_op_name(one)) == 0 else max
            return pick(map(self.of, one.called), key=lambda c: (c.flops, c.memory_bytes))
        if opcode in ("call", "async"):
            return _total(map(self.of, one.called))
        if opcode == "fusion":
            return self._fusion(one, own)
        moved = self._moved(one, own)
        if opcode in _SENT:
            result = n_bytes(one.shape, anywhere=True)
            if one.opcode in ("all-gather-start", "collective-permute-start"):
                # Their shapes hold the operands too.
                result -= sum(n_bytes(own[name].shape, anywhere=True) for name in one.operands)
            sent = Counter({opcode: _SENT[opcode](self._group_size(one)) * result})
            return Costs(memory_bytes=moved, sent=sent)
        if opcode == "custom-call":
            return _kernel(one, own, moved)
        return Costs(self._flops(one, own), moved)

    def _fusion(self, one: Instruction, own: Computation) -> Costs:
        """Of a fusion, and of a collective that starts in it.

        A TPU sends beside its other work: the fusions between the start and the end of a collective
        name it and hand its buffers on. It counts where it starts.
        """
        body = self._computations[one.called[0]]
        sending = next((x for x in body.values() if "chain_id=" in x.attributes), None)
        if sending is None:
            moved = _fusion_bytes(one, body, own)
            return Costs(self._flops(one, own), moved, self._hidden_sums(one))
        kind = hlo_text.root(body).attribute("custom_call_target")
        if kind == "AsyncCollectiveStart":
            return self._instruction(sending, body)
        if kind == "AsyncCollectiveDone":
            return Costs()
        handed = re.findall(r"\{(\d+)\}: \((\d+), \{\}\)", one.attributes)
        results, operands = ({int(x) for x in column} for column in zip(*handed, strict=True))
        return Costs(self._flops(one, own), _fusion_bytes(one, body, own, operands, results))

    def _hidden_sums(self, fusion: Instruction) -> Counter[str]:
        """What a fusion sends: a sum over devices, of which each takes a part, may be one."""
        body = self._computations[fusion.called[0]].values()
        sums = [one for one in body if one.opcode == "all-reduce"]
        if not sums:
            return Counter()
        return Counter(
            {"reduce-scatter": _SENT["reduce-scatter"](self._group_size(sums[0]))
             * n_bytes(fusion.shape, anywhere=True)}
        )  # fmt: skip

    def _group_size(self, one: Instruction) -> int:
        """Devices that a collective joins; empty groups stand for all."""
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", one.attributes):
            return int(found[1])
        found = re.search(r"replica_groups=\{\{([\d,]*)\}", one.attributes)
        return len(found[1].split(",")) if found and found[1] else self._n_devices

    def _runs(self, loop: Instruction) -> int | None:
        """How often a loop's body runs."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(found[1])
        known = self._trips(_op_name(loop))
        if known is not None:
            return known
        condition = self._computations[loop.attribute("condition").lstrip("%")]
        compare = hlo_text.root(condition)
        ends = [condition[name] for name in compare.operands]
        constants = [int(x.arguments) for x in ends if x.opcode == "constant"]
        counts_up = compare.opcode == "compare" and compare.attribute("direction") == "LT"
        return constants[0] if counts_up and len(constants) == 1 else None

    def _flops(self, one: Instruction, own: Computation) -> float:
        if one.opcode == "fusion":
            body = self._computations[one.called[0]]
            return sum(self._flops(inner, body) for inner in body.values())
        if one.opcode in _FREE or one.opcode in _MOVES:
            return 0.0
        if one.opcode in ("dot", "convolution"):
            shapes = [hlo_text.dimensions(own[name].shape) for name in one.operands]
            count = _dot_flops if one.opcode == "dot" else _convolution_flops
            return count(one, *shapes[:2])
        if one.opcode in ("reduce", "reduce-window"):
            return float(sum(hlo_text.elements(own[name].shape) for name in one.operands))
        return float(hlo_text.elements(one.shape))

    def _moved(self, one: Instruction, own: Computation) -> float:
        """Bytes of the device's memory that an instruction, no fusion, reads and writes."""
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * n_bytes(one.shape)
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = own[one.operands[1 if one.opcode == "dynamic-update-slice" else 2]]
            return 2 * n_bytes(update.shape) if n_bytes(one.shape) else 0.0
        if one.opcode == "copy-start":  # its shape holds the source too
            return n_bytes(one.shape)
        if one.opcode == "slice-start":
            source, result, *_ = hlo_text.arrays(one.shape)
            read = n_bytes(result, anywhere=True) if n_bytes(source) else 0.0
            return read + n_bytes(result)
        return n_bytes(one.shape) + sum(n_bytes(own[name].shape) for name in one.operands)


def _op_name(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else ""


def _kernel(one: Instruction, own: Computation, moved: float) -> Costs:
    """A kernel that XLA calls: a ragged product, or one that says itself what it costs."""
    if one.attribute("custom_call_target") in _MARKERS:
        return Costs()
    if one.name.startswith("ragged-dot-metadata"):
        return Costs(memory_bytes=moved)
    if "ragged_dot_tiling" in one.attributes:
        left, right = (hlo_text.dimensions(own[name].shape) for name in one.operands[-2:])
        # (rows, K) by (experts, K, N), or for the latter's gradient (rows, K) by (rows, N).
        return Costs(2.0 * math.prod(left) * right[-1], moved)
    found = re.search(r'"cost_estimate":\{([^}]*)\}', one.attributes)
    if not found:
        return Costs(memory_bytes=moved, unknown_kernels=1)
    said = dict(re.findall(r'"(\w+)":"?(\d+)"?', found[1]))
    return Costs(float(said.get("flops", 0)), float(said.get("bytes_accessed", moved)))


def _fusion_bytes(
    one: Instruction, body: Computation, own: Computation,
    operands: AbstractSet[int] = frozenset(), kept: AbstractSet[int] = frozenset(),
) -> float:  # fmt: skip
    """A fusion reads of an operand what it slices out of it, and writes what it updates.

    But for `operands` and results `kept`, by number, which it leaves as they are.
    """
    total = 0.0
    parameters = {x.name: int(x.arguments) for x in body.values() if x.opcode == "parameter"}
    for name, index in parameters.items():
        if index in operands:
            continue
        shape = own[one.operands[index]].shape
        users = [x for x in body.values() if name in x.operands]
        if users and all(
            x.opcode in ("dynamic-slice", "gather", "slice") and x.operands[0] == name
            for x in users
        ):
            total += sum(n_bytes(x.shape, anywhere=True) for x in users) if n_bytes(shape) else 0
        elif users and all(
            x.opcode == "dynamic-update-slice" and x.operands[0] == name for x in users
        ):
            continue  # updated in place
        else:
            total += n_bytes(shape)
    last = hlo_text.root(body)
    results = [(last, one.shape)]
    if last.opcode == "tuple":
        parts = [body[name] for name in last.operands]
        both = zip(parts, hlo_text.arrays(one.shape), strict=True)
        results = [x for i, x in enumerate(both) if i not in kept]
    for result, shape in results:
        source = result
        while source.opcode == "bitcast":
            source = body[source.operands[0]]
        if source.opcode == "dynamic-update-slice":
            update = body[source.operands[1]].shape
            total += n_bytes(update, anywhere=True) if n_bytes(shape) else 0.0
        else:
            total += n_bytes(shape)
    return total


def _dot_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    contracted = [int(i) for i in one.attribute("lhs_contracting_dims").split(",") if i]
    return 2.0 * hlo_text.elements(one.shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Multiplications and additions of a convolution, as a product of matrices is one on a TPU."""
    data, rest = one.attribute("dim_labels").split("_")
    kernel, result = rest.split("->")
    found = 2.0 * left[data.index("b")] * right[kernel.index("i")] * right[kernel.index("o")]
    found /= int(one.attribute("batch_group_count") or 1)
    out = hlo_text.dimensions(one.shape)
    window = dict(part.split("=") for part in one.attribute("window").split())
    n_spatial = len(data) - 2
    for i in range(n_spatial):
        spatial = str(i)
        sizes = left[data.index(spatial)], right[kernel.index(spatial)], out[result.index(spatial)]
        found *= _valid_pairs(*sizes, {name: value.split("x")[i] for name, value in window.items()})
    return found


def _valid_pairs(n_in: int, n_kernel: int, n_out: int, window: dict[str, str]) -> int:
    """Pairs of a position of the result and one of the kernel that meet a value of the input."""
    low = int(window.get("pad", "0_0").split("_")[0])
    dilation = int(window.get("lhs_dilate", 1))
    at = (
        np.arange(n_out)[:, None] * int(window.get("stride", 1))
        + np.arange(n_kernel) * int(window.get("rhs_dilate", 1))
        - low
    )
    inside = (at >= 0) & (at <= (n_in - 1) * dilation) & (at % dilation == 0)
    return int(inside.sum())
