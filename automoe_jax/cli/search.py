r"""Searches a supernet for the best subnet within limits, or for a whole front.

python launch/search.py --config configs/multi30k.py --workdir runs/multi30k
python launch/search.py --config configs/multi30k.py --workdir runs/multi30k --out=search_60ms \
    --config.search.constraint.latency_ratio=0 --config.search.constraint.latency_ms=60
python launch/search.py --config configs/multi30k.py --workdir runs/multi30k --out=front \
    --config.search.algorithm=nsga2 --config.search.constraint.latency_ratio=0
python launch/search.py --config configs/multi30k.py --workdir runs/multi30k --out=seeds \
    --seeds=1,2,3

A latency limit needs a latency model of this machine (launch/fit_latency.py); where the workdir has
none, it is made first. Without one, --ray searches with the seeds on the nodes of a Ray cluster.
"""

from pathlib import Path
from typing import Any

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import check_out
from automoe_jax.phases.search import search
from automoe_jax.phases.search_seeds import search_seeds
from automoe_jax.phases.weights import searched_params
from automoe_jax.system.errors import UserError

CONFIG = RunFlags(parts=True)
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
    check_out(CONFIG.run(config), _OUT.value)
    if not _RANDOM.value:
        CONFIG.require(" (--random_weights needs none)")
    run = CONFIG.open_run(config)
    if run.workers.remote and not seeds:
        raise UserError("--ray searches with several --seeds at a time; give some, or leave it out")
    data = prepare(run)
    folder = run.path / _OUT.value
    if seeds:
        result = search_seeds(run, _OUT.value, seeds, untrained=_RANDOM.value)
    else:
        params, step = searched_params(run, data.tokenizer.vocab_sizes, untrained=_RANDOM.value)
        result = search(run, folder, data, params, step)
    if _JSON.value:
        terminal.print_json(result)
    elif seeds:
        _show_seeds(result, folder)
    else:
        _show(result, folder)


def _seeds() -> list[int]:
    for text in _SEEDS.value or ():
        if not text.strip().isdecimal():
            raise UserError(f"--seeds has {text!r}; give integers, as --seeds=1,2,3")
    return list(dict.fromkeys(map(int, _SEEDS.value or ())))


def _show(result: dict[str, Any], folder: Path):
    costs = list(result["best"][0]["costs"])
    verified = any(best["verified"] for best in result["best"])
    last = ("final latency ms", "of the largest's") if verified else ()
    rows = []
    for best in result["best"]:
        values = (f"{best['costs'][c]:.4g}" for c in costs)
        rows.append((best["file"], f"{best['loss']:.4f}", *values, *_verified(best["verified"])))
    terminal.print_table(("file", "score", *costs, *last), rows)
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
    ms = verdict["latency"]["mean_ms"], verdict["low_ms"], verdict["high_ms"]
    ratio = verdict["ratio"], verdict["ratio_low"], verdict["ratio_high"]
    return ["{:.4g} [{:.4g}, {:.4g}]".format(*ms), "{:.3f} [{:.3f}, {:.3f}]".format(*ratio)]


def _show_seeds(compared: dict[str, Any], folder: Path):
    header = ("seed", "best score", compared["cost"], "subnets on the front", "hypervolume")
    rows = []
    for seed, row in compared["seeds"].items():
        best = f"{row['best']:.4f}", f"{row['cost_of_best']:.4g}"
        rows.append((seed, *best, str(row["front"]), f"{row['hypervolume_share']:.4f}"))
    terminal.print_table(header, rows)
    print(
        f"best score: mean {compared['best_mean']:.4f}, standard deviation "
        f"{compared['best_std']:.4f}; hypervolume as a share of that of all fronts together"
    )
    print(f"picture: {folder / 'seeds.png'}")
