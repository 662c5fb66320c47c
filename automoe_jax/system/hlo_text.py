"""Reads the text of a compiled program: XLA's HLO, as `Compiled.as_text()` writes it."""

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # others have theirs in their name
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names
    arguments: str  # what stands between the parentheses
    attributes: str
    is_root: bool

    @property
    def called(self) -> list[str]:
        """The computations that it names."""
        found = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            found += [name.strip().lstrip("%") for name in branches.split(",")]
        return found

    def attribute(self, name: str) -> str:
        """The value of an attribute, without quotes or braces around it; "" if it has none."""
        found = re.search(rf'\b{name}=("[^"]*"|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^\s,]+)',
                          self.attributes)  # fmt: skip
        if not found:
            return ""
        value = found[1]
        return value[1:-1] if value[0] in '"{' else value


Computation = dict[str, Instruction]  # by name, in order; the last one, or the root, is the result


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the entry; `ValueError` if it is no such text."""
    computations: dict[str, Computation] = {}
    entry, own = "", None
    for line in text.splitlines():
        if own is None:
            if found := _COMPUTATION.match(line):
                own = computations.setdefault(found[1], {})
                entry = found[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):  # with its thread behind it, where it is not the main one
            own = None
        elif one := _instruction(line):
            own[one.name] = one
    if not entry:
        raise ValueError("the text has no entry computation")
    return computations, entry


def root(computation: Computation) -> Instruction:
    """The instruction whose value a computation has."""
    return next(one for one in computation.values() if one.is_root)


def dimensions(shape: str) -> tuple[int, ...]:
    """The dimensions of an array, or of the first one of a tuple."""
    found = _SHAPE.search(shape)
    assert found is not None, shape
    return tuple(int(n) for n in found[2].split(",") if n)


def elements(shape: str) -> int:
    """Elements of an array, or of all of a tuple."""
    return sum(math.prod(map(int, filter(None, dims.split(",")))) for _, dims, _ in _arrays(shape))


def n_bytes(shape: str, *, anywhere: bool = False) -> float:
    """Bytes of an array or tuple in the device's memory; with `anywhere`, in a core's own too.

    A layout names the memory space: none is the device's, S(1) a TPU core's own.
    """
    total = 0.0
    for dtype, dims, layout in _arrays(shape):
        if "S(" in layout and not anywhere:
            continue
        bits = _BITS.get(dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", dtype)[0])
        total += math.prod(map(int, filter(None, dims.split(",")))) * bits / 8
    return total


def arrays(shape: str) -> list[str]:
    """The shapes of a tuple's arrays, or that of an array."""
    return [found[0] for found in _SHAPE.finditer(shape)]


def _arrays(shape: str) -> list[tuple[str, str, str]]:
    return _SHAPE.findall(shape)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text[:100]!r}")


def _instruction(line: str) -> Instruction | None:
    head, is_one, rest = line.strip().partition(" = ")
    if not is_one:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    arguments = rest[opens + 1 : closes]
    return Instruction(
        name=head.removeprefix("ROOT ").lstrip("%"),
        shape=shape,
        opcode=rest[:opens],
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closes + 1 :].lstrip(", "),
        is_root=head.startswith("ROOT "),
    )
