"""The report of a run: an HTML page that needs no other file, and its pictures."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.report import expert_use
from automoe_jax.report.architecture import SIDES, attention
from automoe_jax.report.elements import (
    SORT,
    STYLE,
    card,
    html_table,
    picture,
    sortable_table,
)
from automoe_jax.report.parts import parts_rows
from automoe_jax.report.plots import LABELS, parts_plot, search_plot, sensitivity_plot, with_svg
from automoe_jax.search.sensitivity import Worth
from automoe_jax.system import files

SEARCHED, PARTS, WORTHS, ROUTED = "search.png", "parts.png", "choices.png", "routing.png"


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """The comparison as text: header, then a row per subnet, the searched one last."""
    header = ["subnet", "params M", "active M", "GFLOPs", "latency ms", "of largest"]
    rows = [[*header, "BLEU inherited", "BLEU trained"]]
    for row in results["rows"]:
        latency, (value, low, high) = row["latency"], row["latency_ratio"]
        params = [f"{row[name] / 1e6:.3f}" for name in ("params", "active_params")]
        flops = f"{row['flops'] / 1e9:.4f}"
        ms = f"{latency['mean_ms']:.2f} ± {latency['std_ms']:.2f}"
        of_largest = f"{value:.2f} [{low:.2f}, {high:.2f}]"
        rows.append([
            row["name"], *params, flops, ms, of_largest, f"{row['bleu_inherited']:.1f}",
            _bleu_trained(row),
        ])  # fmt: skip
    return rows


def _bleu_trained(row: dict[str, Any]) -> str:
    """With its interval; earlier versions have none of it, or no interval."""
    trained, interval = row.get("bleu_trained"), row.get("bleu_trained_95")
    if trained is None:
        return ""
    return f"{trained:.1f}" + (" [{:.1f}, {:.1f}]".format(*interval) if interval else "")


def gain_text(results: dict[str, Any]) -> str:
    """How much better than the random subnet the searched one is after training; "" if unknown."""
    gain = results.get("gain_over_random")
    if not gain:
        return ""
    text = (
        f"{gain['bleu']:+.1f} BLEU against the random subnet after the same training, 95 % "
        f"interval {gain['low']:+.1f} to {gain['high']:+.1f} (paired bootstrap over sentences)"
    )
    # A latency predicted in a busy moment may have been too low.
    limit, rows = results.get("limit_ratio"), results["rows"]
    random = [row["latency_ratio"] for row in rows if row["name"].startswith("random")]
    if limit and random and random[0][1] > limit:
        text += (
            f"; the random subnet is slower than the limit allows, {random[0][0]:.2f} of the "
            f"largest's latency for {limit:g}"
        )
    return text


def write(
    folder: Path,
    results: dict[str, Any],
    lines: list[dict[str, Any]],
    found: dict[str, Any],
    worths: Sequence[Worth] = (),
):
    """Writes `index.html`, and its pictures as PNG and SVG.

    `results` is the content of `results.json`, `lines` those of `history.jsonl`, `found` the result
    of the search, `worths` what each choice is worth by the scored subnets.
    """
    limits, x_name, label = found["limits"], str(found["over"][0]), found["objective"]["label"]
    marked = _marked(found, lines, x_name)
    limit = limits[x_name]["most"] if x_name in limits else None
    search_plot(
        lines, x_name, *with_svg(folder / SEARCHED), limit=limit, marked=marked, y_label=label
    )
    parts = {row["name"]: row["parts_ms"] for row in results["rows"] if "parts_ms" in row}
    if parts:  # reports of earlier versions have none
        parts_plot(
            {name: {k: x[0] for k, x in own.items()} for name, own in parts.items()},
            *with_svg(folder / PARTS),
        )
    if worths:
        sensitivity_plot(worths, LABELS.get(x_name, x_name), *with_svg(folder / WORTHS))
    files.write_text(folder / "index.html", _page(folder, results, found, worths, label))


def _marked(
    found: dict[str, Any], lines: list[dict[str, Any]], x_name: str
) -> dict[str, tuple[float, float]]:
    """Cost and loss of the subnets that the picture names."""
    named = {f"searched, {i}": best for i, best in enumerate(found["best"][:2], 1)}
    named |= found.get("corners", {})  # earlier versions have none
    marked = {name: (x["costs"][x_name], x["sample_loss"]) for name, x in named.items()}
    for line in lines:
        if line["subnet"] == found["random"]["first"]:
            marked["random within the limit"] = line["costs"][x_name], line["loss"]
    return marked


def _page(
    folder: Path,
    results: dict[str, Any],
    found: dict[str, Any],
    worths: Sequence[Worth],
    loss: str,
) -> str:
    test, latency, over = results["test"], results["latency"], str(found["over"][0])
    cost = LABELS.get(over, over)
    searched = results["rows"][-1]["subnet"]
    columns = ["source", "translation", "reference"]
    examples = [[example[name] for name in columns] for example in results["examples"]]
    random = results["random"]
    median = "none" if random["median_loss"] is None else f"{random['median_loss']:.4f}"
    cards = "".join(card(row["subnet"], row["name"]) for row in results["rows"])
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in results["seconds"].items())
    rows = table_rows(results)
    gain = f"{text}. " if (text := gain_text(results)) else ""
    repeating = (
        f"{results['repeating']} of its translations repeat a word or a sign more than "
        f"{results['most_repeats']} times."
        if "repeating" in results
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>automoe_jax report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style>
<h1>Searched translator</h1>
<p>Test BLEU of the searched and trained subnet: <b>{test["bleu"]:.1f}</b>, chrF {test["chrf"]:.1f}
on {test["sentences"]:,} sentences. {gain}{repeating}<br>
<small>{html.escape(test["bleu_signature"])}</small></p>
{sortable_table(rows, chosen=len(rows) - 2)}
<p><small>A click on a column's name sorts by it. Latency: batch 1,
{latency["source_length"]} tokens in, {latency["target_length"]} out, beam {latency["beam_size"]},
{latency["runs"]} runs in turns, 10 % tails dropped, mean ± standard deviation;
{latency["threads_used"]} thread(s), {latency["platform"]}. Ratios with 95 % intervals. BLEU
inherited: with the supernet's weights, without further training; trained: after the same
training of each, with the 95 % interval of a bootstrap over sentences.</small></p>
{_parts(results["rows"], folder)}<h2>Search</h2>
<p>{found["scored"]} subnets scored. Validation loss of the searched subnet
{results["searched_loss"]:.4f}; median of {random["count"]} random subnets within the limit
{median}.</p>
{picture(folder / SEARCHED, "loss against cost of every scored subnet")}
{_choices(worths, loss, cost, folder)}<h2>Architectures</h2>
<div class=cards>{cards}</div>
{html_table("layers", _layers(searched))}
{expert_use.sections(results, folder / ROUTED)}<h2>Examples</h2>
{html_table("text", [columns, *examples])}
<p><small>Phases: {seconds}.</small></p>
<script>{SORT}</script>
</html>
"""


def _parts(rows: list[dict[str, Any]], folder: Path) -> str:
    """The section on what a translation's time is made of; empty where it was not measured."""
    timed = [row for row in rows if "parts_ms" in row]
    if not timed:
        return ""
    lines = parts_rows({row["name"]: row["parts_ms"] for row in timed})
    return f"""<h2>Where the time goes</h2>
{html_table("layers", lines)}
{picture(folder / PARTS, "time of each part of a translation")}
<p><small>What each part adds to those before it, with 95 % intervals: the encoder, the decoder's
layers, the output layer with the choice of the best words, and the rest of the beam
search.</small></p>
"""


def _choices(worths: Sequence[Worth], loss: str, cost: str, folder: Path) -> str:
    """The section on what each choice is worth."""
    if not worths:
        return """<h2>What the choices are worth</h2>
<p>Too few subnets were scored to tell; launch/sensitivity.py scores as many as it takes.</p>
"""
    header = ["choice", "of the loss", "of the cost", "loss, lowest to highest value", "cost"]
    rows = [[*header, "gain per cost"]]
    for w in worths:
        change = f"{w.loss:+.4f} [{w.loss_low:+.4f}, {w.loss_high:+.4f}]"
        gain = "" if w.gain_per_cost is None else f"{w.gain_per_cost:.3g}"
        shares = f"{w.loss_share:.0%}", f"{w.cost_share:.0%}"
        rows.append([w.choice, *shares, change, f"{w.cost:+.3g}", gain])
    idle = ", ".join(w.choice for w in worths if not w.buys)
    idle = f"More of these bought nothing: {idle}." if idle else ""
    return f"""<h2>What the choices are worth</h2>
{html_table("layers", rows)}
{picture(folder / WORTHS, "what each choice explains, and what it buys")}
<p>{html.escape(idle)}<br><small>Linear models of the scored subnets: shares of the variance of
{html.escape(loss)} and of {html.escape(cost)}; changes with 95 % intervals. A search prefers some
subnets: launch/sensitivity.py scores random ones.</small></p>
"""


def _layers(subnet: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per layer of an architecture in JSON form."""
    rows = [["layer", "width", "heads", "experts", "FFN sizes"]]
    for side in SIDES:
        for i, layer in enumerate(subnet[side]["layers"], 1):
            heads = ", ".join(filter(None, attention(layer)))
            sizes = layer["experts"]
            width = str(subnet[side]["embed_dim"])
            rows.append([f"{side} {i}", width, heads, str(len(sizes)), ", ".join(map(str, sizes))])
    return rows
