"""The tables of the pages, from the result files in benchmarks/: see make_results.py."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.phases.comparison import of_study
from automoe_jax.report import gains, systems
from automoe_jax.report.page import table_rows
from automoe_jax.report.parts import parts_rows
from automoe_jax.system import files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICKSTART = RESULTS / "quickstart.json"
STUDIES = ("msdocs", "msdocs_deep", "multi30k")  # corpora of paper_tables.py that have results
# Of a corpus: the budget, and in words.
AGAINST_HAND = {
    "msdocs": ("0.5", "all depths drawn alike"),
    "msdocs_deep": ("0.7", "deep stacks drawn more often"),
}
Table = list[list[str]]
Line = dict[str, Any]

# Rows of the options, by their name in `benchmarks/supernet_options.py`.
OPTIONS = {
    "plain": "plain: one random subnet a batch, `space.sharing=front`",
    "largest_half": "`sampling.largest_share=0.5`: the largest in every other batch",
    "largest_first": "`sampling.largest_first`: the largest alone in the first quarter of updates",
    "largest_first_half": "the same, in the first half",
    "random_experts": "`sampling.random_experts`: any experts instead of the first",
    "experts_bias": "`sampling.experts_bias=1`: many experts are drawn more often",
    "alike_half": "`sampling.alike_share=0.5`: half of the random subnets have layers all alike",
    "flops_draws": "`sampling.flops_draws=16`: FLOPs drawn more uniformly",
    "from_trained": "one FFN of 512 trained alone for as many updates, then the supernet from it "
    "(`--init_from`)",
    "sandwich": "`sampling.rule=sandwich`, four subnets of a quarter of the tokens, of equal time",
    "sandwich_distillation": "the same, with half of the loss from the largest one's predictions",
    "sandwich_conflicts": "the sandwich with `sampling.project_conflicts`",
    "means": "`space.sharing=means`: n experts are the means of n groups of the eight",
    "common": "`space.sharing=common`",
    "own": "`space.sharing=own`: each number of experts has its own",
    "balance_z": "balance and z-loss: `training.load_balance=0.03`, `training.router_z=0.001`",
    "jitter": "`model.router_jitter=0.01`",
    "gate_normalised": "`space.gate=normalised`",
    "gate_count": "`space.gate=count`",
    "numbers_alone": "numbers of experts alone are elastic (all of 512)",
    "sizes_alone": "sizes of FFNs alone are elastic (one expert)",
    "nothing_elastic": "nothing is elastic: one FFN of 512",
}
RECIPES = {
    "old": "branches not scaled, peak rate 2e-3",
    "plain": "scaled branches, peak rate 4e-3",
    "word": "the same, half of the loss from a teacher's predictions",
    "sequence": "the same as the second, the teacher's translations beside the text",
    "both": "both",
}
CASES = {
    "plain": "float32",
    "bfloat16": "bfloat16",
    "zero": "bfloat16, `shard_optimizer`",
    "long": "the same, four times the tokens",
    "pod": "bfloat16, `shard_optimizer`",
    "experts_16": "16 experts a layer",
    "experts_64": "64 experts of up to 4,096 a layer, `expert_parallel=16`",
    "most_copied": "16 experts a layer, all on each chip",
    "over_copied": "17: more than 16 GB",
    "most_cut": "43 experts a layer, `shard_optimizer`",
    "over_cut": "44: more than 16 GB",
    "most_spread": "144 experts of up to 4,096 a layer, `expert_parallel=16`",
    "over_spread": "160: more than 16 GB",
    "remat": "bfloat16, `shard_optimizer`, `remat=layer`",
    "one_width": "bfloat16, `shard_optimizer`, width 640 alone",
    "one_size": "bfloat16, `shard_optimizer`, FFNs of 3,072 alone",
}
MODELS = {
    "base": "Transformer-Base",
    "big": "Transformer-Big",
    "ende_standard": "En-De, standard experts",
    "ende_fractional": "En-De, fractional experts",
}
# Of the trainings of benchmarks/experts_pay.py; their logs say it.
UPDATES_OF_AN_EPOCH = 1525


def lines(name: str) -> list[Line]:
    return list(files.parse_json_lines(RESULTS / f"{name}.jsonl"))


def options() -> Table:
    """What options of a supernet's training are worth."""
    counts = ("1", "2", "4", "8")
    rows = [["option", "updates", "seed", *counts, "random", "gain of 8"]]
    found = lines("supernet_options")
    if missing := {x["option"] for x in found} - OPTIONS.keys():
        sys.exit(f"docs/result_tables.py has no label for {', '.join(sorted(missing))}")
    for option, label in OPTIONS.items():
        for x in (x for x in found if x["option"] == option):
            losses = [f"{x['losses'][n]:.3f}" if n in x["losses"] else "" for n in counts]
            several = len(x["losses"]) > 1
            gain = f"{x['gain']:+.3f}" if "gain" in x else ""
            random = f"{x['random']:.3f}" if several or option == "sizes_alone" else ""
            rows.append([label, f"{x['updates']:,}", str(x["seed"]), *losses, random, gain])
    own = [x for x in lines("experts_pay") if _scaled(x) and x["updates"] == 1200]
    alone = {str(x["experts"]): x["losses"]["1200"] for x in own if x.get("ffn", 512) == 512}
    label = "a model of its own, from scratch (not inherited)"
    losses = [f"{alone[n]:.3f}" if n in alone else "" for n in counts]
    rows.append([label, "1,200", "0", *losses, "", f"{alone['1'] - alone['8']:+.3f}"])
    return rows


def depths() -> Table:
    """What dense subnets inherit, by decoder depth and width, from supernets trained otherwise."""
    found = lines("supernet_depths")
    choices = [tuple(x[:2]) for x in found[0]["losses"]]
    titles = [f"{depth} of {width}" for depth, width in choices]
    rows = [["sampling", *titles, "random"]]
    for x in found:
        losses = {(depth, width): loss for depth, width, loss in x["losses"]}
        own = [f"`{name}={value:g}`" for name, value in x["sampling"].items()]
        values = [*(losses[choice] for choice in choices), x["random"]]
        rows.append([", ".join(own) or "plain", *(f"{value:.3f}" for value in values)])
    return rows


def recipes() -> Table:
    """What a recipe of training is worth, means over seeds."""
    kinds = ("last", "average", "ema")
    titles = "last", "average of 8 checkpoints, 50 updates apart", "moving average, decay 0.998"
    rows, found = [["recipe", "seeds", *titles]], lines("distillation")
    for recipe, label in RECIPES.items():
        if own := [x["bleu"] for x in found if x["recipe"] == recipe]:
            means = (f"{np.mean([x[kind] for x in own]):.1f}" for kind in kinds)
            rows.append([label, str(len(own)), *means])
    return rows


def recipe_gains() -> Table:
    """BLEU of each recipe's averaged weights over the first one's last, seed by seed.

    With intervals where both models' translations were compared.
    """
    old, *others = RECIPES
    bleus = {(x["recipe"], x["seed"]): x["bleu"] for x in lines("distillation")}
    differences = {(x["recipe"], x["seed"]): x for x in lines("distillation_differences")}
    seeds = sorted(seed for recipe, seed in bleus if recipe == old)
    rows = [["recipe", *(f"seed {seed}" for seed in seeds), "mean"]]
    for recipe in others:
        gains = {
            seed: bleus[recipe, seed]["average"] - bleus[old, seed]["last"]
            for seed in seeds
            if (recipe, seed) in bleus
        }
        cells = []
        for seed in seeds:
            cell = f"{gains[seed]:+.1f}" if seed in gains else ""
            if found := differences.get((recipe, seed)):
                cell += f" [{found['low']:+.1f}, {found['high']:+.1f}]"
            cells.append(cell)
        if gains:
            rows.append([RECIPES[recipe], *cells, f"{np.mean(list(gains.values())):+.1f}"])
    return rows


def _scaled(x: Line) -> bool:
    usual = x.get("gate", "probability") == "probability" and x.get("sharing", "front") == "front"
    return usual and x["ffn_scale"] == 0.25 and not x["seed"]


def experts_by_updates(n: int) -> dict[int, Line]:
    """Trainings with n experts of 512 in each layer and scaled branches, by updates."""
    found = (x for x in lines("experts_pay") if _scaled(x) and x.get("ffn", 512) == 512)
    own = {x["updates"]: x for x in found if x["experts"] == n}
    return {updates: own[updates] for updates in sorted(own)}


def experts_gain() -> Table:
    """Eight experts against one FFN by updates, with scaled branches."""
    rows = [["updates", "epochs", "one FFN: nats, BLEU", "eight experts: nats, BLEU",
             "gain: nats, BLEU"]]  # fmt: skip
    one, eight = (experts_by_updates(n) for n in (1, 8))
    for updates in sorted(one.keys() & eight):
        both = one[updates], eight[updates]
        nats = [x["losses"][str(updates)] for x in both]
        bleus = [x["bleu"] for x in both if "bleu" in x]
        cells = [[f"{x:.3f}" for x in (*nats, nats[0] - nats[1])], [""] * 3]
        if len(bleus) == 2:
            cells[1] = [f", {x:.1f}" for x in (*bleus, bleus[1] - bleus[0])]
        epochs = f"{updates / UPDATES_OF_AN_EPOCH:.1f}"
        rows.append([f"{updates:,}", epochs, *map("".join, zip(*cells, strict=True))])
    return rows


def larger_ffns() -> Table:
    """One FFN of several sizes, and eight experts, after 1,200 updates."""
    rows = [["in each layer", "FFN weights", "active FFN FLOPs", "nats"]]
    found = [x for x in lines("experts_pay") if _scaled(x) and x["updates"] == 1200]
    shown = [(1, 512), (8, 512), (1, 1024), (1, 4096)]
    for n, ffn in shown:
        x = next(x for x in found if (x["experts"], x.get("ffn", 512)) == (n, ffn))
        what = f"one FFN of {ffn:,}" if n == 1 else f"eight experts of {ffn}"
        weights = str(n * ffn // 512)
        rows.append([what, weights, str(ffn // 512), f"{x['losses']['1200']:.3f}"])
    return rows


def quickstart() -> Table:
    """The subnets of quickstart's report."""
    return table_rows(files.read_json(QUICKSTART, "results"))


def quickstart_parts() -> Table:
    """What the translations of quickstart's subnets spend their time on, ms."""
    rows = files.read_json(QUICKSTART, "results")["rows"]
    return parts_rows({row["name"]: row["parts_ms"] for row in rows})


def topologies() -> Table:
    """What steps need on chips that are not here."""
    title = "step", "slice", "weights", "tokens of a chip", "memory of a chip"
    rows = [[*title, "moved", "computed", "sent", "at least: compute, memory, network"]]
    found = {x["case"]: x for x in lines("topologies")}
    for case, label in CASES.items():
        if x := found.get(case):
            times = ", ".join(f"{ms:.0f}" for ms in x["ms_at_least"].values())
            rows.append([
                label, x["slice"], f"{x['weights'] / 1e6:,.0f} M", f"{x['tokens_per_chip']:,}",
                f"{x['gb']:.1f} GB", f"{x['gb_moved']:.1f} GB", f"{x['tflop']:.2f} TFLOP",
                f"{x['gb_sent']:.1f} GB", f"{times} ms",
            ])  # fmt: skip
    return rows


def cpu_latency() -> Line:
    return files.read_json(RESULTS / "cpu_latency.json", "results")


def fastest(found: Line, program: str) -> tuple[Line, str]:
    """Spread of a program's times, ms, on the better number of threads, and that number."""
    times = {k: v for k, v in found["ms"].items() if k.startswith(f"{program} ")}
    name = min(times, key=lambda k: times[k]["median"])
    return times[name], name.rpartition(" ")[2]


def translators() -> Table:
    """Latency of models and engines, ms."""
    engines = {
        "fp32": "ours {} fp32", "int8": "ours {} int8",
        "CTranslate2 fp32": "ctranslate2 {} float32",
        "CTranslate2 int8": "ctranslate2 {} int8_float32", "PyTorch fp32": "pytorch {} fp32",
    }  # fmt: skip
    title, *others = engines
    rows, found = [["model", title, "floor", *others]], cpu_latency()
    for model, label in MODELS.items():
        cells = []
        for program in engines.values():
            name, cell = program.format(model), ""
            if any(k.startswith(name) for k in found["ms"]):
                ms, threads = fastest(found, name)
                low, high = ms["min"], ms["max"]
                cell = f"{ms['median']:.0f} ({low:.0f}-{high:.0f}), {threads}"
            cells.append(cell)
        rows.append([label, cells[0], f"{found['floor_ms'][model]:.0f}", *cells[1:]])
    return rows


def against_hand(corpus: str) -> list[str]:
    """What search found on a corpus against the best dense model by hand that is as fast."""
    budget, about = AGAINST_HAND[corpus]
    hand = next(
        x for x in gains.gains(study(corpus))
        if x.latencies and x.budget == budget and "dense model made by hand" in x.what
    )  # fmt: skip
    seeds, value = "one seed", f"{np.mean(hand.bleus):+.1f}"
    if len(hand.bleus) > 1:
        seeds = f"mean of {len(hand.bleus)} seeds"
        value += f" ({', '.join(f'{x:+.1f}' for x in hand.bleus)})"
    elif hand.interval is not None:
        value += " [{:+.1f}, {:+.1f}]".format(*hand.interval)
    return [
        f"documentation text, limit {budget} of the largest dense Transformer's latency, {about}: "
        f"what search found against the best dense model by hand ({hand.against[0]}), {seeds}",
        f"{value} BLEU at {np.mean(hand.latencies):.2f} times the latency",
        "`benchmarks/paper_tables.py`",
    ]


def quickstart_headline() -> list[str]:
    """What a run of the quickstart took and found."""
    quick = files.read_json(QUICKSTART, "results")
    by_name = {row["name"]: row for row in quick["rows"]}
    minutes, gain = sum(quick["seconds"].values()) / 60, quick["gain_over_random"]
    found, random = (
        f"{row['bleu_trained']:.1f} BLEU at {row['latency_ratio'][0]:.2f}"
        for row in (by_name["searched"], by_name["random within the limit"])
    )
    return [
        "train, search, train the best, export: quickstart",
        f"{minutes:.1f} minutes; {found} of the largest subnet's latency, a random subnet {random} "
        f"({gain['bleu']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}])",
        "`make quickstart`",
    ]


def headline() -> Table:
    """README's figures."""
    rows, found = [["what", "figure", "command"]], cpu_latency()

    def ms(program: str) -> str:
        return f"{fastest(found, program)[0]['median']:.0f}"

    ours = f"{ms('ours base fp32')} ms in fp32, {ms('ours base int8')} in int8"
    ct2 = f"{ms('ctranslate2 base float32')} and {ms('ctranslate2 base int8_float32')}"
    torch = ms("pytorch base fp32")
    rows.append([
        f"Transformer-Base, one sentence, beam 5, {found['cores']} cores of an {found['machine']}",
        f"{ours}; CTranslate2 {ct2}, PyTorch {torch}", "`benchmarks/cpu_latency.py`",
    ])  # fmt: skip
    rows.append(quickstart_headline())
    by_updates = [experts_by_updates(n) for n in (1, 8)]
    most = max(updates for updates, x in by_updates[0].items() if "bleu" in x)
    one, eight = (own[most]["bleu"] for own in by_updates)
    rows.append([
        f"174,000 lines of documentation text, {most:,} updates on one core",
        f"{one:.1f} BLEU with one FFN a layer, {eight:.1f} with eight experts",
        "`benchmarks/experts_pay.py`",
    ])  # fmt: skip
    rows += map(against_hand, AGAINST_HAND)
    fitting = (x for x in lines("topologies") if x["gb"] <= 16)
    largest = max(fitting, key=lambda x: x["weights"])
    rows.append([
        "the largest supernet that fits 256 chips of TPU v5e with 16 GB each, by its compiled step",
        f"{largest['weights'] / 1e9:.1f} billion weights, {largest['gb']:.1f} GB a chip",
        "`benchmarks/topologies.py`",
    ])  # fmt: skip
    return rows


def study(corpus: str) -> list[systems.Row]:
    """The models of paper_tables.py on a corpus."""
    rows, _ = of_study(RESULTS / f"paper_{corpus}.jsonl")
    return rows


def systems_of(corpus: str) -> Table:
    """The systems of the paper, side by side."""
    return systems.table(systems.grouped(study(corpus)))


def gains_of(corpus: str) -> Table:
    """What the gain of a searched mixture is made of."""
    return gains.table(study(corpus))


TABLES: dict[str, Callable[[], Table]] = {
    "supernet_options": options,
    "supernet_depths": depths,
    "recipes": recipes,
    "recipe_gains": recipe_gains,
    "experts_gain": experts_gain,
    "larger_ffns": larger_ffns,
    "quickstart": quickstart,
    "quickstart_parts": quickstart_parts,
    "topologies": topologies,
    "translators": translators,
    "headline": headline,
    **{f"systems_{corpus}": partial(systems_of, corpus) for corpus in STUDIES},
    **{f"gains_{corpus}": partial(gains_of, corpus) for corpus in STUDIES},
}
