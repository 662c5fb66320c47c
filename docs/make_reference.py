"""Writes docs/reference.md: the commands, their options and the fields of a config.

python docs/make_reference.py            # writes it
python docs/make_reference.py --check    # exits with 1 where it is not what this would write
"""

import dataclasses
import importlib
import sys
import textwrap
from pathlib import Path
from typing import Any

from absl import flags

from automoe_jax.cli import main as console
from automoe_jax.config import RunConfig
from automoe_jax.system import field_docs

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference

The commands with their options, and the fields of a config. Written by `make docs` from the code.

A command `X` is `automoe X` where the package is installed, and `python launch/X.py` in a clone.
Options are given as `--name=value`, fields of a config as `--config.group.field=value`, several
values with commas between them.

## Commands
"""


def main():
    text = HEAD + "".join(map(command, console.COMMANDS)) + "\n## Fields of a config\n\n"
    config = RunConfig()
    text += "`config.seed` (0) is that of data, initial weights, subnets and dropout.\n"
    seen: dict[type, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in seen:
            text += f"\n### config.{field.name}\n\nThe fields of config.{seen[type(value)]}.\n"
        elif dataclasses.is_dataclass(value):
            text += "\n" + group(field.name, value)
            seen[type(value)] = field.name
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE.name} is stale; run: make docs")
        return
    PAGE.write_text(text, encoding="utf-8")


def command(name: str) -> str:
    """The section of a command."""
    values = flags.FLAGS
    before = set(values)
    module = importlib.import_module(f"automoe_jax.cli.{name}")
    # The first time, absl's own are there.
    own = [f for f in values.get_key_flags_for_module(module) if f.name not in before]
    rows = []
    for flag in own:
        default = "" if flag.default is None else f"`{_shown(flag.default)}`"
        about = " ".join((flag.help or "").split())
        allowed = getattr(flag.parser, "enum_values", None)
        if allowed:
            about = about.split(">: ", 1)[-1] + f" ({', '.join(allowed)})"
        rows.append((f"`--{flag.name}`", default, about))
    for flag_name in set(values) - before:
        delattr(values, flag_name)
    about = textwrap.dedent(module.__doc__ or "").strip()
    first, _, rest = about.partition("\n")
    section = f"\n### {name}\n\n{first}\n"
    if rest.strip():
        section += f"\n```text\n{rest.strip()}\n```\n"
    return section + (_table(("option", "default", "what it is"), rows) if rows else "")


def group(name: str, config: Any) -> str:
    """The sections of a group of a config, and of the groups in it."""
    text, known = field_docs.described(type(config))
    rows, inner = [], ""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner += "\n" + group(f"{name}.{field.name}", value)
        else:
            rows.append((f"`{field.name}`", f"`{_shown(value)}`", known.get(field.name, "")))
    table = _table(("field", "default", "what it is"), rows)
    return f"### config.{name}\n\n{text}\n{table}{inner}"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or " "
    return str(value) if value != "" else " "


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    cells = ([cell.replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines)
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


if __name__ == "__main__":
    main()
