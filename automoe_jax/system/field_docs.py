"""Descriptions of the fields of a dataclass, from its docstring and the comments beside them."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap


@functools.cache
def described(kind: type) -> tuple[str, dict[str, str]]:
    """What a dataclass is for, and what each of its fields is.

    Returns:
      Its docstring and those of the dataclasses it inherits from, up to `Attributes:`; and by
      field what stands there, or in a comment beside or above it, where one of them says it.
    """
    texts, known = [], dict[str, str]()
    for own in _dataclasses(kind):
        text, _, listed = inspect.cleandoc(own.__doc__ or "").partition("Attributes:")
        texts.append(text.strip())
        known = _attributes(listed) | known
    return "\n\n".join(texts), known | _comments(kind)


def _dataclasses(kind: type) -> list[type]:
    return [own for own in kind.__mro__ if dataclasses.is_dataclass(own)]


def _attributes(listed: str) -> dict[str, str]:
    """The entries of a docstring's `Attributes:`, of several names with commas too."""
    entries = re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", listed, re.MULTILINE)
    return {
        name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")
    }


def _comments(kind: type) -> dict[str, str]:
    """What comments beside or above fields say, of a dataclass and of those it inherits from."""
    found: dict[str, str] = {}
    for own in reversed(_dataclasses(kind)):
        lines = textwrap.dedent(inspect.getsource(own)).splitlines()
        body = ast.parse("\n".join(lines)).body[0]
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            above = []
            at = node.lineno - 2
            while lines[at].strip().startswith("#"):
                above.insert(0, lines[at].strip().lstrip("# "))
                at -= 1
            _, mark, beside = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
            if above or mark:
                found[node.target.id] = " ".join([*above, beside]).strip()
    return found
