"""Searches a supernet for the best subnet within limits, or for a whole front.

python launch/search.py --config configs/multi30k.py --workdir runs/multi30k
python launch/search.py --config configs/multi30k.py --workdir runs/multi30k --out=search_60ms \
    --config.search.constraint.latency_ratio=0 --config.search.constraint.latency_ms=60
python launch/search.py --config configs/multi30k.py --workdir runs/multi30k --out=front \
    --config.search.algorithm=nsga2 --config.search.constraint.latency_ratio=0
python launch/search.py --config configs/multi30k.py --workdir runs/multi30k --out=seeds \
    --seeds=1,2,3

A latency limit needs a latency model of this machine (launch/fit_latency.py); where the workdir has
none, it is made first.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Table

from automoe_jax.cli import options, terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.config import RunConfig
from automoe_jax.phases import run as phases
from automoe_jax.phases import search as search_phase
from automoe_jax.phases import search_result, search_seeds
from automoe_jax.system import compile_cache, files
from automoe_jax.system.errors import UserError

CONFIG = ConfigFlag()
_WORKDIR = options.define_workdir()
_OUT = flags.DEFINE_string(
    "out", "search", "folder in the workdir; another one for another limit or algorithm"
)
_RANDOM = flags.DEFINE_bool(
    "random_weights", False, "search with an untrained supernet: for trying out limits and speed"
)
_SEEDS = flags.DEFINE_list(
    "seeds", None, "search once per seed, each in seed_N under --out, and compare the fronts"
)
_JSON = options.define_json("print the result as one JSON line")


def main():
    config = CONFIG.load()
    seeds = _seeds()
    progress = terminal.TerminalProgress()
    run = phases.open_run(config, _WORKDIR.value or CONFIG.default_workdir)
    compile_cache.enable(run / phases.CACHE)
    data = phases.prepare_run(config, run, progress)
    vocab_sizes = data.tokenizer.vocab_sizes
    if _RANDOM.value:
        params, step = phases.random_weights(config, vocab_sizes), None
    else:
        params, step = phases.supernet_params(config, run, vocab_sizes)

    def one(own: RunConfig, folder: Path) -> dict[str, Any]:
        phases.claim_search(own, folder, step)
        if not (folder / search_result.RESULT).exists():
            search_phase.run_search(own, run, folder, data, params, progress)
        return files.read_json(folder / search_result.RESULT, "search result")

    folder = run / _OUT.value
    if not seeds:
        result = one(config, folder)
        if _JSON.value:
            terminal.print_json(result)
            return
        _show(result, folder)
        return
    results = {}
    for seed in seeds:
        progress.note(f"seed {seed}")
        own = dataclasses.replace(config, search=dataclasses.replace(config.search, seed=seed))
        results[seed] = one(own, folder / f"seed_{seed}")
    compared = search_seeds.compare(folder, seeds)
    if _JSON.value:
        terminal.print_json(compared)
        return
    _show_seeds(compared, folder)


def _seeds() -> list[int]:
    seeds = []
    for text in _SEEDS.value or ():
        if not text.strip().isdecimal():
            raise UserError(f"--seeds has {text!r}; give integers, as --seeds=1,2,3")
        seeds.append(int(text))
    return list(dict.fromkeys(seeds))


def _show(result: dict[str, Any], folder: Path):
    costs = list(result["best"][0]["costs"])
    verified = any(best["verified"] for best in result["best"])
    last = ("final latency ms", "of the largest's") if verified else ()
    table = Table("file", "score", *costs, *last)
    for best in result["best"]:
        row = [f"{best['costs'][c]:.4g}" for c in costs] + _verified(best["verified"])
        table.add_row(best["file"], f"{best['loss']:.4f}", *row)
    terminal.print_table(table)
    print(f"subnets: {folder}/best_*.json")
    print(f"score: {result['objective']['label']}, on the whole validation set")
    random = result["random"]
    if random["median_loss"] is not None:
        print(
            f"{random['count']} random subnets within the limits, on the sample: median "
            f"{random['median_loss']:.4f}, best {random['best_loss']:.4f}; the first of the table "
            f"{result['best'][0]['sample_loss']:.4f}"
        )
    if result["measurements"] is not None:
        print(f"latencies measured: {result['measurements']}")
    print(f"front: {result['front']} subnets in {folder / 'front.json'}")
    print(f"pictures: {folder}/*.png   history: {folder / 'history.jsonl'}")


def _verified(verdict: dict[str, Any] | None) -> list[str]:
    """The final measurement with its 95 % intervals."""
    if verdict is None:
        return []
    ms = f"{verdict['latency']['mean_ms']:.4g}"
    return [
        f"{ms} [{verdict['low_ms']:.4g}, {verdict['high_ms']:.4g}]",
        f"{verdict['ratio']:.3f} [{verdict['ratio_low']:.3f}, {verdict['ratio_high']:.3f}]",
    ]


def _show_seeds(compared: dict[str, Any], folder: Path):
    table = Table("seed", "best score", compared["cost"], "subnets on the front", "hypervolume")
    for seed, row in compared["seeds"].items():
        table.add_row(
            seed,
            f"{row['best']:.4f}",
            f"{row['cost_of_best']:.4g}",
            str(row["front"]),
            f"{row['hypervolume_share']:.4f}",
        )
    terminal.print_table(table)
    print(
        f"best score: mean {compared['best_mean']:.4f}, standard deviation "
        f"{compared['best_std']:.4f}; hypervolume as a share of that of all fronts together"
    )
    print(f"picture: {folder / 'seeds.png'}")
