"""The scored candidates of a search, one JSON line each: nothing is scored twice."""

from pathlib import Path
from typing import Any

from automoe_jax.architecture.subnet import Subnet, from_json, to_json
from automoe_jax.system import files

HISTORY = "history.jsonl"


class ScoreHistory:
    """`history.jsonl`: subnet, score, origin, iteration, parents, limits and costs per line.

    `lines` are in the order of scoring, those before a restart included.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / HISTORY
        self.lines = files.read_json_lines(self._path)
        self._losses = {from_json(line["subnet"]): line["loss"] for line in self.lines}

    def loss(self, subnet: Subnet) -> float | None:
        """The score of a subnet, or None."""
        return self._losses.get(subnet)

    def known(self, subnet: Subnet) -> float:
        """The score of a subnet that has one."""
        return self._losses[subnet]

    def append(self, subnet: Subnet, loss: float, about: dict[str, Any]):
        """Records a score with what is known about the candidate."""
        self._losses[subnet] = loss
        line = {"loss": loss, **about, "subnet": to_json(subnet)}
        self.lines.append(line)
        files.append_json_line(self._path, line)
