"""Files of one JSON object per line, which a killed process leaves readable."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where it is missing; a torn last line is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as f:
            f.truncate(end)
    return [json.loads(line) for line in data[:end].splitlines()]


def append_line(path: Path, line: dict[str, Any]):
    """Appends an object as one line."""
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")
