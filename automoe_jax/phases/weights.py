"""Trained weights of a workdir: the supernet's, and those of trained subnets."""

import dataclasses
from pathlib import Path
from typing import Any

from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.config import RunConfig
from automoe_jax.decoding.export import random_params
from automoe_jax.model.extract import Params
from automoe_jax.phases.prepare import vocab_sizes
from automoe_jax.phases.run import SUBNET, SUPERNET, Run
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.training.checkpoints import latest_step, load_params
from automoe_jax.training.target import TrainingTarget, abstract_state

CHOSEN = "chosen.json"  # in subnet/: the finalist that the pipeline exports


def target(
    config: RunConfig, vocab_sizes: tuple[int, int], subnet: Subnet | None = None
) -> TrainingTarget:
    """The model to train: the supernet, or one subnet."""
    return TrainingTarget(config.space, vocab_sizes, config.model, subnet)


def check_space(config: RunConfig, folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of trained weights; `UserError` if their search space is not the config's."""
    manifest = workdir.read(folder, kind)
    theirs = workdir.with_defaults(manifest["config"]["space"], config.space)
    for name, given in dataclasses.asdict(config.space).items():
        value = list(given) if isinstance(given, tuple) else given
        if theirs.get(name) != value:
            raise UserError(
                f"{folder} was trained with another space: space.{name} is {theirs.get(name)} "
                f"there and {value} here; use the same config"
            )
    return manifest


# What `final_weights` of a training are, after "step 1500".
_KINDS = {
    "last": "",
    "average": ", mean of the last checkpoints",
    "ema": ", moving average",
    "best": ", lowest validation loss",
}


def origin(folder: Path, name: str, step: int, final_weights: str = "last") -> str:
    """Describes where a folder's weights come from, for an export's manifest."""
    kind = SUPERNET if folder.name == SUPERNET else SUBNET
    name_of = _KINDS[final_weights] if step else ""  # converted weights have one kind
    source = workdir.read(folder, kind).get(workdir.CONVERTED)
    if source is None:
        return f"{name}, step {step}{name_of}"
    trained_on = f", trained on to step {step}{name_of}" if step else ""
    return f"{name}, converted from {source['checkpoint']}{trained_on}"


def supernet_params(run: Run, vocab_sizes: tuple[int, int]) -> tuple[Params, int]:
    """The newest weights of the run's supernet, and their step."""
    if latest_step(run.supernet) is not None:
        check_space(run.config, run.supernet, SUPERNET)
    elif (run.path / SUBNET / workdir.MANIFEST).exists():
        raise UserError(
            f"{run.path} holds a subnet and no supernet; leave --subnet out to use the subnet"
        )
    return load_params(
        target(run.config, vocab_sizes), run.config.training, run.supernet, run.progress.note
    )


def searched_params(
    run: Run, vocab_sizes: tuple[int, int], *, untrained: bool
) -> tuple[Params, int | None]:
    """What a search searches with: `supernet_params`, or random weights and no step."""
    if untrained:
        return random_weights(run.config, vocab_sizes), None
    return supernet_params(run, vocab_sizes)


def subnet_params(run: Run, out: str = SUBNET) -> tuple[Params, Subnet, int]:
    """The newest weights of a trained subnet, its architecture, and their step."""
    folder = run.path / out
    if not (folder / workdir.MANIFEST).exists():
        raise UserError(
            f"{folder} has no trained subnet; train one with launch/train.py --subnet, or give "
            "--subnet=FILE to export one with the supernet's weights"
        )
    manifest = check_space(run.config, folder, SUBNET)
    subnet = from_json(manifest["config"]["subnet"])
    own = target(run.config, vocab_sizes(run), subnet)
    params, step = load_params(own, run.config.subnet_training, folder, run.progress.note)
    return params, subnet, step


def trained_folder(run: Run) -> str:
    """The run's trained subnet: `subnet`, or the finalist that the pipeline chose."""
    folder = run.path / SUBNET
    if (folder / workdir.MANIFEST).exists() or not (folder / CHOSEN).exists():
        return SUBNET
    return chosen_finalist(run)


def chosen_finalist(run: Run) -> str:
    """Folder of the finalist that the pipeline chose, as `subnet/1`."""
    choice = files.read_json(run.path / SUBNET / CHOSEN, "choice")
    # Earlier versions wrote its index, from 0 on.
    return choice["folder"] if "folder" in choice else f"{SUBNET}/{choice['chosen'] + 1}"


def random_weights(
    config: RunConfig, vocab_sizes: tuple[int, int], subnet: Subnet | None = None
) -> Params:
    """Random weights of the supernet or a subnet, for timing."""
    state = abstract_state(target(config, vocab_sizes, subnet), config.training, config.seed)
    return random_params(state.params, config.seed)
