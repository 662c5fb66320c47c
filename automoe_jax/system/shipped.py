"""The configs and architectures that come with the project, found by name."""

import ast
import difflib
import os
from pathlib import Path

from automoe_jax.system.errors import UserError

_PACKAGE = Path(__file__).parent.parent
# Inside the package where it is installed, beside it in a clone.
FOLDER = next(x for x in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if x.is_dir())
_SUBNETS = ("subnets", "systems")


def configs() -> list[Path]:
    """The config files."""
    return sorted(FOLDER.glob("*.py"))


def subnets() -> list[Path]:
    """The architectures that a subnet file is asked for."""
    return [path for name in _SUBNETS for path in sorted((FOLDER / name).glob("*.json"))]


def config(given: str) -> str:
    """The path of a config: as it is given, or of the shipped file that it names.

    What stands behind a colon is kept. `UserError` for a name, without folder and suffix, that no
    shipped config has.
    """
    name, colon, rest = given.partition(":")
    found = _find(name, {path.stem: path for path in configs()}, ".py", "config")
    return f"{found}{colon}{rest}"


def subnet(given: str) -> str:
    """As `config`, of a subnet file."""
    return str(_find(given, {path.stem: path for path in subnets()}, ".json", "architecture"))


def first_line(program: Path) -> str:
    """The first line of the docstring of a Python file, which is not run for it."""
    module = ast.parse(program.read_text(encoding="utf-8"))
    return (ast.get_docstring(module) or "").partition("\n")[0]


def _find(given: str, known: dict[str, Path], suffix: str, what: str) -> str | Path:
    path = Path(given)
    # A folder of that name is no config: it may be the workdir of one.
    if not given or os.path.isfile(given):
        return given
    # "configs/quickstart.py", where there is no clone.
    below = FOLDER.joinpath(*path.parts[1:]) if path.parts[0] == FOLDER.name else FOLDER / path
    if path.suffix == suffix and os.path.isfile(below):
        return below
    if path.suffix or len(path.parts) > 1:
        return given
    if given not in known:
        near = difflib.get_close_matches(given, known, 1, 0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{given} is neither a file nor a shipped {what}; {hint}`automoe configs` lists these"
        )
    return known[given]
