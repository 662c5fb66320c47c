"""The report of a run: an HTML page and its picture."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.report.architecture import SIDES, attention
from automoe_jax.report.parts import parts_rows
from automoe_jax.report.plots import LABELS, parts_plot, search_plot
from automoe_jax.search.sensitivity import Worth
from automoe_jax.system import files

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
.compared tr:last-child { background: var(--mark); font-weight: 600; }
img { max-width: 100%; background: #fff; }
code { background: var(--card); padding: .1rem .3rem; }
small { color: var(--soft); }
"""


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
        trained = row.get("bleu_trained")  # earlier versions have none
        bleus = (f"{row['bleu_inherited']:.1f}", "" if trained is None else f"{trained:.1f}")
        rows.append([row["name"], *params, flops, ms, of_largest, *bleus])
    return rows


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
    """Writes `index.html` and its pictures.

    `results` is the content of `results.json`, `lines` those of `history.jsonl`, `found` the result
    of the search, `worths` what each choice is worth by the scored subnets.
    """
    limits, x_name, label = found["limits"], found["over"][0], found["objective"]["label"]
    marked = _marked(found, lines, x_name)
    limit = limits[x_name]["most"] if x_name in limits else None
    search_plot(lines, x_name, folder / "search.png", limit, marked, label)
    parts = {row["name"]: row["parts_ms"] for row in results["rows"] if "parts_ms" in row}
    if parts:  # reports of earlier versions have none
        parts_plot(
            {name: {k: x[0] for k, x in own.items()} for name, own in parts.items()},
            folder / "parts.png",
        )
    files.write_text(folder / "index.html", _page(results, found, worths, label))


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
    results: dict[str, Any], found: dict[str, Any], worths: Sequence[Worth], loss: str
) -> str:
    test, latency, over = results["test"], results["latency"], str(found["over"][0])
    cost = LABELS.get(over, over)
    searched = results["rows"][-1]["subnet"]
    columns = ["source", "translation", "reference"]
    examples = [[example[name] for name in columns] for example in results["examples"]]
    random = results["random"]
    median = "none" if random["median_loss"] is None else f"{random['median_loss']:.4f}"
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in results["seconds"].items())
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
{html_table("compared", table_rows(results))}
<p><small>Latency: batch 1, {latency["source_length"]} tokens in, {latency["target_length"]} out,
beam {latency["beam_size"]}, {latency["runs"]} runs in turns, 10 % tails dropped, mean ± standard
deviation; {latency["threads_used"]} thread(s), {latency["platform"]}. Ratios with 95 % intervals.
BLEU inherited: with the supernet's weights, without further training; trained: after the same
training of each.</small></p>
{_parts(results["rows"])}<h2>Search</h2>
<p>{found["scored"]} subnets scored. Validation loss of the searched subnet
{results["searched_loss"]:.4f}; median of {random["count"]} random subnets within the limit
{median}.</p>
<img src="search.png" alt="loss against cost of every scored subnet">
{_choices(worths, loss, cost)}<h2>Architecture</h2>
{html_table("layers", _layers(searched))}
{_routing(results["routing"], results.get("routing_losses"))}<h2>Examples</h2>
{html_table("text", [columns, *examples])}
<p><small>Phases: {seconds}.</small></p>
</html>
"""


def _parts(rows: list[dict[str, Any]]) -> str:
    """The section on what a translation's time is made of; empty where it was not measured."""
    timed = [row for row in rows if "parts_ms" in row]
    if not timed:
        return ""
    lines = parts_rows({row["name"]: row["parts_ms"] for row in timed})
    return f"""<h2>Where the time goes</h2>
{html_table("layers", lines)}
<img src="parts.png" alt="time of each part of a translation">
<p><small>What each part adds to those before it, with 95 % intervals: the encoder, the decoder's
layers, the output layer with the choice of the best words, and the rest of the beam
search.</small></p>
"""


def _choices(worths: Sequence[Worth], loss: str, cost: str) -> str:
    """The section on what each choice is worth; empty without worths."""
    if not worths:
        return ""
    rows = [["choice", "of the loss", "of the cost", "loss, lowest to highest value", "cost"]]
    for w in worths:
        change = f"{w.loss:+.4f} [{w.loss_low:+.4f}, {w.loss_high:+.4f}]"
        rows.append(
            [w.choice, f"{w.loss_share:.0%}", f"{w.cost_share:.0%}", change, f"{w.cost:+.3g}"]
        )
    idle = ", ".join(w.choice for w in worths if not w.buys)
    idle = f"More of these bought nothing: {idle}." if idle else ""
    return f"""<h2>What the choices are worth</h2>
{html_table("layers", rows)}
<p>{html.escape(idle)}<br><small>Linear models of the scored subnets: shares of the variance of
{html.escape(loss)} and of {html.escape(cost)}; changes with 95 % intervals. A search prefers some
subnets: launch/sensitivity.py scores random ones.</small></p>
"""


def _routing(layers: list[dict[str, Any]], losses: dict[str, float] | None) -> str:
    """The section on routers; empty where every layer has one expert."""
    several = [layer for layer in layers if len(layer["sizes"]) > 1]
    if not several:
        return ""
    rows = [["layer", "entropy", "load of each expert", "tokens by FFN size"]]
    for layer in several:
        load = ", ".join(f"{share:.0%}" for share in layer["load"])
        by_size = ", ".join(f"{n}: {share:.0%}" for n, share in layer["share_by_size"].items())
        most = math.log(len(layer["sizes"]))
        rows.append([layer["layer"], f"{layer['entropy']:.2f} of {most:.2f}", load, by_size])
    choice = ""
    if losses is not None:  # reports of earlier versions have none
        choice = (
            f" What the routers' choice is worth: a loss of {losses['learned']:.3f} nats a token; "
            f"with the same gates and random experts {losses['random']:.3f}, with the largest "
            f"expert of each layer {losses['largest']:.3f}."
        )
    return f"""<h2>Routing</h2>
{html_table("layers", rows)}
<p><small>On validation text. Entropy of the router's probabilities in nats, and its maximum: there
the router has no preference. Below, which share of the tokens of a class each expert gets: of
frequent and rare ones, and by their place in a word.{choice}</small></p>
<img src="routing.png" alt="share of the tokens of each expert, by class">
"""


def html_table(css_class: str, rows: list[list[str]]) -> str:
    """An HTML table; its first row is the header."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<div class=wide><table class={css_class}>{''.join(lines)}</table></div>"


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
