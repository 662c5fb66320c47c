"""Exact differences between the files that two commits wrote."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """How many named values differ or are missing on one side, of how many, and the first of them.

    Values are arrays, compared bit for bit, or JSON.
    """
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        raise ValueError("there is nothing to compare")
    different = [n for n in names if not _same(before.get(n), after.get(n))]
    first = None
    if different:
        name = different[0]
        first = f"{name}: {_first(before.get(name), after.get(name))}"
    return {"compared": len(names), "different": len(different), "first": first}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return False
    # As text, NaN equals itself; floats are written with all their digits.
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _first(a: Any, b: Any) -> str:
    """The first place where two values differ."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{a.dtype}{list(a.shape)} before, {b.dtype}{list(b.shape)} after"
        gap = np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)))
        return f"values differ by up to {gap:.3g}"
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        keys, a, b = list(range(len(a))), dict(enumerate(a)), dict(enumerate(b))
    else:
        return f"{_text(a)} before, {_text(b)} after"
    key = next(k for k in keys if not _same(a.get(k), b.get(k)))
    return f"{key}: {_first(a.get(key), b.get(key))}"


def _text(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)


def json_lines(path: Path) -> list[Any]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def history(folder: Path) -> dict[str, Any]:
    """A search's scored candidates by line number."""
    lines = json_lines(folder / "history.jsonl")
    return {f"line {i}": line for i, line in enumerate(lines, 1)}


def metric_lines(folder: Path) -> list[tuple[str, Any]]:
    """A training's logged values with step and name, in order.

    Times, rates (names in `_s`) and how the process ran (`run/`) are left out.
    """
    return [
        (f"step {line['step']} {line['name']}", line["value"])
        for line in json_lines(folder / "metrics.jsonl")
        if not line["name"].endswith("_s") and not line["name"].startswith("run/")
    ]


def metrics(folder: Path) -> dict[str, Any]:
    """`metric_lines` by step and name."""
    return dict(metric_lines(folder))


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a training's last checkpoint by path."""
    steps = [path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()]
    return dict(_arrays(max(steps, key=lambda path: int(path.name))))


def _arrays(step: Path) -> Iterator[tuple[str, np.ndarray]]:
    for item in sorted(path for path in step.iterdir() if (path / "_METADATA").exists()):
        tree = ocp.PyTreeCheckpointer().restore(item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            yield item.name + jax.tree_util.keystr(path), np.asarray(leaf)


def read_translations(path: Path) -> dict[str, Any]:
    """Hypotheses with their scores by the number of the translation."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {f"translation {i}": hypotheses for i, hypotheses in enumerate(found, 1)}
