"""Small files: clear errors when reading, atomic writing."""

import json
import os
from pathlib import Path
from typing import Any

from automoe_jax.system.errors import UserError


def read_text(path: str | Path, what: str) -> str:
    """The UTF-8 text of a file; `UserError`, calling it a `what` file, if it cannot be read."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{what} file {path} is a folder; give a file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{what} file {path} is not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"{what} file {path} cannot be read: {e.strerror}") from None


def read_json(path: str | Path, what: str) -> Any:
    """The content of a JSON file; `UserError` if it is not JSON."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} file {path} is not JSON: {e}") from None


def write_text(path: str | Path, text: str):
    """Writes a file under a temporary name and renames it: readers see the old or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes):
    """As `write_text`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def expanded(path: str | Path) -> Path:
    """The path with `~` expanded; `UserError` if there is no such user, or for a URL."""
    if "://" in str(path):
        raise UserError(f"{path} is a URL, and a folder of this machine is needed; copy it")
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UserError(f"{path}: {e}") from None


def write_json(path: str | Path, obj: Any):
    """Writes an object as indented JSON, atomically."""
    write_text(path, json.dumps(obj, indent=1, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that this process appends to, one a line; none where it is missing.

    Cuts off a torn last line.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as f:
            f.truncate(end)
    found = []
    for i, line in enumerate(data[:end].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path}, line {i}, is damaged: {e}; remove that line") from None
    return found


def parse_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of somebody's file, one a line, which stays as it is; without a torn last line.

    `UserError` if it cannot be read, or a line is no object.
    """
    whole = read_text(path, "JSON lines")
    found = []
    for i, line in enumerate(lines(whole), 1):
        try:
            content = json.loads(line)
        except ValueError as e:
            if i == len(lines(whole)) and not whole.endswith("\n"):
                break
            raise UserError(f"{path}, line {i}, is not JSON: {e}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}, line {i}, is no JSON object")
        found.append(content)
    return found


def append_json_line(path: Path, line: dict[str, Any]):
    """Appends an object as one line; a process killed meanwhile leaves the file readable."""
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


def lines(text: str) -> list[str]:
    """Lines ended by line feeds only: Unicode's other line separators are text."""
    found = text.split("\n")
    return found if found[-1] else found[:-1]
