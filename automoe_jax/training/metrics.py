"""Metrics of a run as JSON lines and TensorBoard events."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

NAME = "metrics.jsonl"
_PROTO: Any = event_pb2  # its classes are made at run time


class MetricsWriter:
    """Appends to `metrics.jsonl`, one object per line: step, wall_s, name, value.

    A resumed run continues `wall_s` and first removes the lines of later steps, so the file is that
    of an uninterrupted run.
    """

    def __init__(self, folder: Path, resumed_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / NAME
        kept = [line for line in read(folder) if line["step"] <= resumed_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self._path)
        self._file = self._path.open("a")
        before = max((line["wall_s"] for line in kept), default=0.0)
        self._start = time.monotonic() - before
        # Written by this thread: what a disk that is full makes of another's cannot be caught.
        (folder / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(folder / "tensorboard" / "events"))
        # TensorBoard then hides what an earlier process wrote of these steps.
        started = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
        self._board.write_event(_PROTO.Event(step=resumed_step + 1, session_log=started))

    def write(self, step: int, values: dict[str, float]):
        """Writes the values of a step."""
        wall = round(time.monotonic() - self._start, 3)
        for name, value in values.items():
            line = {"step": step, "wall_s": wall, "name": name, "value": value}
            self._file.write(json.dumps(line) + "\n")
            event = _PROTO.Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._board.write_event(event)
        self._file.flush()
        self._board.flush()

    def close(self):
        self._file.close()
        self._board.close()


def read(folder: Path) -> list[dict]:
    """The lines written so far, without an incomplete last one."""
    path, lines = folder / NAME, []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
