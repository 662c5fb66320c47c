"""A table of what the parts of a translation take."""

from collections.abc import Sequence


def parts_rows(systems: dict[str, dict[str, Sequence[float]]]) -> list[list[str]]:
    """Header, then a row for each system: what each part of a translation takes, with interval."""
    header, *_ = systems.values()
    rows = [["ms [95 %]", *header]]
    for name, parts in systems.items():
        cells = (f"{ms:.2f} [{low:.2f}, {high:.2f}]" for ms, low, high in parts.values())
        rows.append([name, *cells])
    return rows
