"""What a search has measured and scored, on disk line by line: nothing is computed twice."""

import json
from pathlib import Path
from typing import Any

from automoe_jax.architecture.subnet import Subnet, from_json, to_json

HISTORY, MEASUREMENTS = "history.jsonl", "measurements.jsonl"


class History:
    """Memory of a search. A killed search, started again, finds here what it had done.

    `history.jsonl` has a line per scored candidate: subnet, loss, the value of each constraint and
    how it was got, iteration, origin, parents. `measurements.jsonl` has a line per constraint
    value, those of rejected candidates included.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = {name: folder / name for name in (HISTORY, MEASUREMENTS)}
        self.lines = _read(self._paths[HISTORY])
        self._losses = {from_json(line["subnet"]): line["loss"] for line in self.lines}
        self._values = {
            (line["constraint"], from_json(line["subnet"])): line
            for line in _read(self._paths[MEASUREMENTS])
        }

    def loss(self, subnet: Subnet) -> float | None:
        return self._losses.get(subnet)

    def value(self, constraint: str, subnet: Subnet) -> tuple[float, str] | None:
        """(value, how it was got) of a constraint, or None."""
        line = self._values.get((constraint, subnet))
        return None if line is None else (line["value"], line["how"])

    def about(self, constraint: str, subnet: Subnet) -> dict[str, Any]:
        """Everything recorded with a value; nothing where there is none."""
        return self._values.get((constraint, subnet), {})

    def records(self, constraint: str) -> list[dict[str, Any]]:
        """Everything recorded of a constraint, in the order that it came."""
        return [line for (name, _), line in self._values.items() if name == constraint]

    def measured(self, constraint: str, subnet: Subnet, value: float, how: str, **about: Any):
        """Records a constraint's value, with whatever else is to be known of it."""
        line = {"constraint": constraint, "value": value, "how": how, **about}
        line["subnet"] = to_json(subnet)
        self._values[constraint, subnet] = line
        self._append(MEASUREMENTS, line)

    def scored(self, subnet: Subnet, loss: float, **about: Any):
        """Records a candidate's loss and what is known about it."""
        self._losses[subnet] = loss
        line = {"loss": loss, **about, "subnet": to_json(subnet)}
        self.lines.append(line)
        self._append(HISTORY, line)

    def _append(self, name: str, line: dict[str, Any]):
        with self._paths[name].open("a") as f:
            f.write(json.dumps(line) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that a kill has torn is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as f:
            f.truncate(end)
    return [json.loads(line) for line in data[:end].splitlines()]
