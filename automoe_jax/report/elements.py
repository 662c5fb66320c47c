"""Parts of HTML that the pages share: style, pictures, tables, cards of architectures."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.report.architecture import SIDES, attention

STYLE = """
:root { color-scheme: light dark; --text: light-dark(#1d2129, #e4e7ec);
  --back: light-dark(#fff, #14171c); --line: light-dark(#d6dae0, #343a44);
  --soft: light-dark(#5a6270, #9aa3b2); --card: light-dark(#f2f3f5, #1f242c);
  --mark: light-dark(#eef6ee, #1d2b20); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--back); overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  overflow-wrap: normal; white-space: nowrap; }
th:first-child, td:first-child, .text td { text-align: left; }
.text th { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; min-width: 5.5rem; }
.chosen { background: var(--mark); font-weight: 600; }
.sortable button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; }
.sortable th[aria-sort=ascending] button::after { content: " \\2191"; }
.sortable th[aria-sort=descending] button::after { content: " \\2193"; }
.sortable td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: #fff; }
svg { max-width: 100%; height: auto; background: #fff; }
code { background: var(--card); padding: .1rem .3rem; }
small { color: var(--soft); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; padding: .6rem .7rem; background: var(--card); border-radius: .4rem; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .3rem; }
figure div { display: flex; gap: 2px; font-size: .7rem; line-height: 1.35; margin: 1px 0; }
figure b { width: 1.6rem; font-weight: 400; color: var(--soft); }
figure i { font-style: normal; text-align: center; overflow: hidden; border-radius: 2px;
  min-width: 1px; }
figure .encoder i { background: hsl(210 65% 50% / 40%); }
figure .decoder i { background: hsl(28 85% 50% / 40%); }
.shaded { line-height: 1.9; }
.shaded span { padding: .1rem 0; white-space: pre-wrap; }
"""
# Makes the header cells of sortable tables sort them: by the numbers that a column's cells begin
# with, where all of them do, else as text.
SORT = """
for (const head of document.querySelectorAll(".sortable th")) {
  head.querySelector("button").addEventListener("click", () => {
    const table = head.closest("table"), column = [...head.parentNode.children].indexOf(head);
    const falls = head.getAttribute("aria-sort") !== "descending" && column > 0 ||
      head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falls ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const text = row => row.children[column].textContent;
    const number = row => parseFloat(text(row).replaceAll(",", ""));
    const numbers = rows.every(row => !text(row) || !isNaN(number(row)));
    rows.sort((a, b) => {
      if (!text(a) || !text(b)) return !text(a) - !text(b);
      const order = numbers ? number(a) - number(b) : text(a).localeCompare(text(b));
      return falls ? -order : order;
    });
    table.tBodies[0].append(...rows);
  });
}
"""


def picture(path: Path, about: str) -> str:
    """A PNG inside the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{html.escape(about)}">'


def html_table(css_class: str, rows: list[list[str]]) -> str:
    """An HTML table; its first row is the header."""
    lines = [_row("td" if i else "th", row) for i, row in enumerate(rows)]
    return f"<div class=wide><table class={css_class}>{''.join(lines)}</table></div>"


def _row(tag: str, texts: list[str], attributes: str = "") -> str:
    cells = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    return f"<tr{attributes}>{cells}</tr>"


def sortable_table(rows: list[list[str]], chosen: int | None = None) -> str:
    """As `html_table`, with buttons in the header, for pages with the script `SORT`.

    The row with the index `chosen`, of those below the header, is marked.
    """
    header, *body = rows
    cells = "".join(f"<th><button>{html.escape(text)}</button></th>" for text in header)
    lines = [_row("td", row, " class=chosen" * (i == chosen)) for i, row in enumerate(body)]
    return (
        f"<div class=wide><table class=sortable><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def card(subnet: dict[str, Any], title: str) -> str:
    """An architecture in JSON form: a line for each layer, a bar for each expert."""
    layers = [
        (side, i, subnet[side]["embed_dim"], layer)
        for side in SIDES
        for i, layer in enumerate(subnet[side]["layers"], 1)
    ]
    largest = max(max(layer["experts"]) for *_, layer in layers) or 1
    lines = []
    for side, i, width, layer in layers:
        heads, span = attention(layer)
        about = html.escape(f"width {width}, {heads} heads {span}".strip())
        bars = "".join(
            f'<i style="flex:0 1 {rem:.2f}rem" title="FFN of {size}">{size}</i>'
            for size in layer["experts"]
            if (rem := max(5 * size / largest, 0.3))
        )
        lines.append(f'<div class="{side}" title="{about}"><b>{side[0]}{i}</b>{bars}</div>')
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(lines)}</figure>"


def shaded(pieces: Sequence[str], shares: Sequence[float], titles: Sequence[str]) -> str:
    """A sentence whose pieces are the darker the higher their share, from 0 to 1, is."""
    spans = (
        f'<span title="{html.escape(title)}" style="background:hsl(28 85% 50% / '
        f'{8 + 52 * share:.0f}%)">{html.escape(piece or "·")}</span>'
        for piece, share, title in zip(pieces, shares, titles, strict=True)
    )
    return f"<p class=shaded>{''.join(spans)}</p>"
