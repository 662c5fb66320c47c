"""Successive halving: short trainings of all candidates, longer ones of the better half.

The rounds of Jamieson & Talwalkar 2016 (arXiv 1502.07943) with losses of training in place of
inherited ones, which may not tell candidates apart.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import Subnet, short_name, to_json
from automoe_jax.phases.first_weights import group_of
from automoe_jax.phases.rank import trained_loss
from automoe_jax.phases.run import Run, claim, each_part
from automoe_jax.phases.train import SUBNET_GROUPS, train_subnet
from automoe_jax.phases.weights import trained_folder
from automoe_jax.system import files
from automoe_jax.training.checkpoints import latest_step

RESULT, BEST = "halving.json", "best.json"


def halve(
    run: Run, out: str, subnets: Sequence[Subnet], steps: int, init_from: Path | None = None
) -> dict[str, Any]:
    """Trains candidates in rounds until two are left, and ranks all of them, best first.

    The first round trains each by `steps` updates, each later one the better half (rounded up) of
    the round before, from where it is, by twice as many; each round has a learning-rate schedule
    of its own. First weights are those of the workdir `init_from`, see `train_subnet`; for None
    those of the run's supernet, random where it has none. Writes `halving.json`, whose content it
    returns, and `best.json`, a subnet file, into the folder `out`. A killed run continues with the
    training that it was at.
    """
    config, folder = run.config, run.path / out
    supernet_step = latest_step(run.supernet) if init_from is None else None
    inherit = supernet_step is not None
    source = run.path if inherit else init_from
    asked = {"steps": steps, "inherit": inherit, "subnets": list(map(to_json, subnets))}
    settings = {**config.groups(*SUBNET_GROUPS), **asked}
    if init_from is not None:
        settings |= _origin(run, init_from)
    if inherit:
        settings |= config.training.weights_for("supernet_weights")
        settings["supernet_step"] = supernet_step
    begun = (folder / RESULT).exists() or any(folder.glob("[0-9]*"))
    claim(run, out, "halving", settings, begun=begun, added=["supernet_step"])
    if (folder / RESULT).exists():
        _remove_trainings(folder, len(subnets))  # a kill may have left some
        return files.read_json(folder / RESULT, "halving")
    alive, losses = list(range(len(subnets))), [[] for _ in subnets]
    updates, seconds, nth = 0, 0.0, 0
    while True:
        own = steps * 2**nth
        nth += 1
        run.progress.note(f"round {nth}: {len(alive)} candidates, {own:,} updates each")
        rounds = [_Round(subnets[i], f"{out}/{i + 1}", nth, own, source) for i in alive]
        found: dict[int, float] = {}
        for place, (loss, took) in each_part(run, _trained, rounds):
            found[alive[place]] = loss
            seconds += took
            run.progress.note(f"{short_name(subnets[alive[place]])}: loss {loss:.4f}")
        for i in alive:
            losses[i].append(found[i])
        updates += own * len(alive)
        if len(alive) <= 2:
            break
        alive = sorted(alive, key=lambda i: losses[i][-1])[: (len(alive) + 1) // 2]
    order = sorted(range(len(subnets)), key=lambda i: (-len(losses[i]), losses[i][-1]))
    rows = [
        {"subnet": to_json(subnets[i]), "losses": losses[i],
         "gflops": complexity.count(subnets[i]).flops / 1e9}
        for i in order
    ]  # fmt: skip
    result = {
        "version": 1, "updates": updates, "seconds": seconds, "inherit": inherit,
        "init_from": None if init_from is None else run.stored(init_from), "subnets": rows,
    }  # fmt: skip
    files.write_json(folder / BEST, rows[0]["subnet"])
    files.write_json(folder / RESULT, result)
    _remove_trainings(folder, len(subnets))
    return result


def _origin(run: Run, init_from: Path) -> dict[str, Any]:
    """The weights that candidates start from, for the manifest."""
    source = dataclasses.replace(run, path=init_from)
    step = latest_step(source.supernet)
    if step is None:
        step = latest_step(init_from / trained_folder(source))
    weights = group_of(source).weights_for("init_weights")
    return {"init_from": run.stored(init_from), "init_step": step, **weights}


def _remove_trainings(folder: Path, count: int):
    for i in range(count):
        shutil.rmtree(folder / str(i + 1), ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Round:
    """A candidate's training of one round, in a folder of the run."""

    subnet: Subnet
    folder: str
    nth: int  # from 1
    steps: int
    source: Path | None  # of the first round's weights


def _trained(run: Run, own: _Round) -> tuple[float, float]:
    """Validation loss of a candidate after a round, and the seconds that this took.

    Of a round that was killed they are those since it went on.
    """
    subnet, folder, nth, steps = own.subnet, own.folder, own.nth, own.steps
    done = run.path / folder / f"{nth}.json"
    if done.exists():
        known = files.read_json(done, "loss")
        return known["loss"], known.get("seconds", 0.0)  # earlier versions have none
    begun = time.monotonic()
    whole = run.config.subnet_training
    warmup = min(whole.warmup_steps, steps // 4)
    training = dataclasses.replace(
        whole, steps=steps, warmup_steps=warmup, eval_every=0, patience=0, final_weights="last"
    )
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, subnet_training=training))
    out, before = f"{folder}/round_{nth}", f"{folder}/round_{nth - 1}"
    if nth == 1:
        train_subnet(run, subnet, own.source, out)
    else:
        train_subnet(run, subnet, out=out, after=before)
    loss = trained_loss(run, out)
    seconds = time.monotonic() - begun
    files.write_json(done, {"version": 1, "loss": loss, "seconds": seconds})
    if nth > 1:
        shutil.rmtree(run.path / before)
    return loss, seconds
