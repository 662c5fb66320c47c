"""The report of a run: one HTML page with its pictures beside it."""

import html
from pathlib import Path
from typing import Any

from automoe_jax.report.plots import search_plot
from automoe_jax.system import files

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2129; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d6dae0; text-align: right; }
th:first-child, td:first-child, td.text { text-align: left; }
tr.chosen { background: #eef6ee; font-weight: 600; }
img { max-width: 100%; }
code { background: #f2f3f5; padding: .1rem .3rem; }
small { color: #5a6270; }
"""


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """The comparison as text: header, then a row per subnet. The last is the searched one."""
    rows = [
        ["subnet", "params M", "active M", "GFLOPs", "latency ms", "of largest", "BLEU inherited"]
    ]
    for row in results["rows"]:
        latency, (value, low, high) = row["latency"], row["latency_ratio"]
        rows.append(
            [
                row["name"],
                f"{row['params'] / 1e6:.3f}",
                f"{row['active_params'] / 1e6:.3f}",
                f"{row['flops'] / 1e9:.4f}",
                f"{latency['mean_ms']:.2f} ± {latency['std_ms']:.2f}",
                f"{value:.2f} [{low:.2f}, {high:.2f}]",
                f"{row['bleu_inherited']:.1f}",
            ]
        )
    return rows


def write(folder: Path, results: dict[str, Any], lines: list[dict[str, Any]], found: dict):
    """Writes `index.html` and `search.png`.

    Args:
      folder: `report/`.
      results: of the pipeline.
      lines: of the search's history.
      found: the search's result.
    """
    limits = found["limits"]
    x_name = found["over"][0]
    marked = {
        f"best {i}": (best["costs"][x_name], best["sample_loss"])
        for i, best in enumerate(found["best"][:3], 1)
    }
    most = limits[x_name]["most"] if x_name in limits else None
    label = found["objective"]["label"]
    search_plot(lines, x_name, folder / "search.png", most, marked, label)
    files.write_text(folder / "index.html", _page(results, found))


def _page(results: dict[str, Any], found: dict[str, Any]) -> str:
    def cells(tag: str, values: list[str]) -> str:
        return "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values)

    header, *rows = table_rows(results)
    body = "".join(
        f"<tr{' class=chosen' if row[0] == 'searched' else ''}>{cells('td', row)}</tr>"
        for row in rows
    )
    test, latency = results["test"], results["latency"]
    cards = "".join(_card(row) for row in results["rows"] if row["name"] == "searched")
    examples = "".join(
        "<tr>"
        + "".join(
            f"<td class=text>{html.escape(e[k])}</td>"
            for k in ("source", "translation", "reference")
        )
        + "</tr>"
        for e in results["examples"]
    )
    random = results["random"]
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in results["seconds"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>automoe_jax report</title><style>{_STYLE}</style>
<h1>Searched translator</h1>
<p>Test BLEU of the searched and trained subnet: <b>{test["bleu"]:.1f}</b>, chrF {test["chrf"]:.1f}
on {test["sentences"]:,} sentences.<br><small>{html.escape(test["bleu_signature"])}</small></p>
<table><tr>{cells("th", header)}</tr>{body}</table>
<p><small>Latency: batch 1, {latency["source_length"]} tokens in, {latency["target_length"]} out,
beam {latency["beam_size"]}, {latency["runs"]} runs in turns, 10 % tails dropped, mean ± standard
deviation; {latency["threads_used"]} thread(s), {latency["platform"]}. Ratios with 95 % intervals.
BLEU inherited: with the supernet's weights, without further training.</small></p>
<h2>Search</h2>
<p>{found["scored"]} subnets scored. Validation loss of the searched subnet
{results["searched_loss"]:.4f}; median of {random["count"]} random subnets within the limit
{_number(random["median_loss"])}.</p>
<img src="search.png" alt="loss against cost of every scored subnet">
{cards}
<h2>Examples</h2>
<table><tr><th>source</th><th>translation</th><th>reference</th></tr>{examples}</table>
<p><small>Phases: {seconds}.</small></p>
</html>
"""


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _card(row: dict[str, Any]) -> str:
    """The architecture, layer by layer."""
    subnet = row["subnet"]
    lines = []
    for side in ("encoder", "decoder"):
        for i, layer in enumerate(subnet[side]["layers"], 1):
            if side == "encoder":
                heads = str(layer["heads"])
            else:
                heads = (
                    f"{layer['self_heads']} / {layer['cross_heads']}, span {layer['cross_span']}"
                )
            experts = ", ".join(map(str, layer["experts"]))
            lines.append(
                f"<tr><td>{side} {i}</td><td>{subnet[side]['embed_dim']}</td><td>{heads}</td>"
                f"<td>{len(layer['experts'])}</td><td>{experts}</td></tr>"
            )
    return (
        "<h2>Architecture</h2><table><tr><th>layer</th><th>width</th><th>heads</th>"
        f"<th>experts</th><th>FFN sizes</th></tr>{''.join(lines)}</table>"
    )
