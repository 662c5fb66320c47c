"""Searches a supernet for the best subnet within a limit.

python launch/search.py --config configs/multi30k.py --workdir runs/multi30k
python launch/search.py --config configs/multi30k.py --workdir runs/multi30k --out=search_60ms \
    --config.constraint.latency_ratio=0 --config.constraint.latency_ms=60
"""

import common
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from automoe_jax import huge_pages

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: runs/<config>)")
_OUT = flags.DEFINE_string(
    "out", "search", "folder in the workdir; another one for another limit or algorithm"
)
_RANDOM = flags.DEFINE_bool(
    "random_weights", False, "search with an untrained supernet: for trying out limits and speed"
)
_JSON = flags.DEFINE_bool("json", False, "print the result as one JSON line")


def main():
    huge_pages.use()
    common.set_jax_defaults()
    config = common.load_config(_CONFIG)
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from automoe_jax import compile_cache, files, phases, search_phase  # noqa: PLC0415
    from automoe_jax.training import loop  # noqa: PLC0415

    progress = common.TerminalProgress()
    run = phases.open_run(config, _WORKDIR.value or common.default_workdir())
    compile_cache.enable(run / phases.CACHE)
    data = phases.prepare_run(config, run, progress)
    vocab_sizes = data.tokenizer.vocab_sizes
    if _RANDOM.value:
        what = phases.trained(config, vocab_sizes)
        state = loop.initial_state(what, config.training, config.seed)
        params, step = jax.tree.map(np.asarray, state.params), None
    else:
        params, step = phases.supernet_params(config, run, vocab_sizes)
    folder = run / _OUT.value
    phases.claim_search(config, folder, step)
    if not (folder / search_phase.RESULT).exists():
        search_phase.run_search(config, run, folder, data, params, progress)
    result = files.read_json(folder / search_phase.RESULT, "search result")
    if _JSON.value:
        common.print_json(result)
        return
    costs = list(result["best"][0]["costs"])
    table = Table("file", "loss", *costs, "of the largest's latency")
    for best in result["best"]:
        verified = best["verified"]
        share = "" if verified is None else f"{verified['ratio']:.3f}"
        row = [f"{best['costs'][c]:.4g}" for c in costs]
        table.add_row(str(folder / best["file"]), f"{best['loss']:.4f}", *row, share)
    Console(width=None if Console().is_terminal else 120).print(table)
    random = result["random"]
    if random["median_loss"] is not None:
        print(
            f"{random['count']} random subnets within the limit: median loss "
            f"{random['median_loss']:.4f}, best {random['best_loss']:.4f}"
        )
    print(f"plot: {folder / 'search.png'}   history: {folder / 'history.jsonl'}")


if __name__ == "__main__":
    common.run(main)
