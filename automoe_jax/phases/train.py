"""Trains the supernet or one subnet, and loads their weights."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from automoe_jax.architecture.subnet import Subnet, from_json, to_json
from automoe_jax.config import RunConfig
from automoe_jax.data.tokens import PreparedData
from automoe_jax.decoding.export import random_params
from automoe_jax.model.extract import Params, inherited
from automoe_jax.model.upcycle import upcycled
from automoe_jax.phases.prepare import prepare, vocab_sizes
from automoe_jax.phases.run import SUBNET, SUPERNET, Run, claim
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.training import loop
from automoe_jax.training.checkpoints import latest_step, load_params
from automoe_jax.training.clock import Span
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.target import TrainingTarget, abstract_state, initial_state

CHOSEN = "chosen.json"  # in subnet/: the finalist that the pipeline exports
# Groups of the config that trained weights depend on.
_COMMON = ("seed", "data", "tokenizer", "space", "model")
SUPERNET_GROUPS, SUBNET_GROUPS = (*_COMMON, "training", "sampling"), (*_COMMON, "subnet_training")


def target(
    config: RunConfig, vocab_sizes: tuple[int, int], subnet: Subnet | None = None
) -> TrainingTarget:
    """The model to train: the supernet, or one subnet."""
    return TrainingTarget(config.space, vocab_sizes, config.model, subnet)


def settings(config: RunConfig, subnet: Subnet | None, init_from: str | None) -> dict[str, Any]:
    """All settings that a trained supernet or subnet depends on, for its manifest."""
    if subnet is None:
        return config.groups(*SUPERNET_GROUPS)
    own = {"subnet": to_json(subnet), "init_from": init_from}
    return {**config.groups(*SUBNET_GROUPS), **own}


def train_supernet(run: Run, profile: Span | None = None):
    """Trains the supernet in `supernet/`, from its newest checkpoint if there is one.

    `profile` as in `loop.train`.
    """
    config = run.config
    step = latest_step(run.supernet)
    _check_conversion(run.supernet, SUPERNET, step)
    if step == 0:  # converted weights, not trained here yet
        _check_space(config, run.supernet, SUPERNET)
    claim(run, SUPERNET, SUPERNET, settings(config, None, None), begun=bool(step))
    data = prepare(run)
    supernet = target(config, data.tokenizer.vocab_sizes)
    _train(run, supernet, config.training, data, run.supernet, profile=profile)


def train_subnet(
    run: Run,
    subnet: Subnet,
    init_from: Path | None = None,
    out: str = SUBNET,
    profile: Span | None = None,
    *,
    after: str | None = None,
):
    """Trains one subnet of the space by group `subnet_training`, in the folder `out`.

    Continues from its newest checkpoint if there is one. The first weights are those of the
    supernet in the workdir `init_from`, or of its trained subnet where it has no supernet and the
    two differ in experts alone; random for None. With `after`, they are those of the same subnet in
    this folder of the run. `profile` as in `loop.train`.
    """
    config, folder = run.config, run.path / out
    config.space.validate(subnet)
    step = latest_step(folder)
    _check_conversion(folder, SUBNET, step)
    if step == 0:
        if init_from is not None:
            raise UserError(
                f"{folder} holds converted weights to start from; leave --init_from out, or "
                "name another folder with --out"
            )
        manifest = _check_space(config, folder, SUBNET)
        if from_json(manifest["config"]["subnet"]) != subnet:
            raise UserError(f"{folder} holds another subnet; name another folder with --out")
    source = after if init_from is None else str(init_from)
    if init_from == run.path:
        source = "."  # stays true when the workdir is moved
    claim(run, folder, SUBNET, settings(config, subnet, source), begun=bool(step))
    data = prepare(run, init_from)
    own = target(config, data.tokenizer.vocab_sizes, subnet)
    params = None
    if after is not None and step is None:
        params, _, _ = subnet_params(run, after)
    elif init_from is not None and step is None:
        params = _first_params(dataclasses.replace(run, path=init_from), own, folder)
    _train(run, own, config.subnet_training, data, folder, params, profile)


def _first_params(source: Run, own: TrainingTarget, folder: Path) -> Params:
    """A subnet's weights in the supernet of a workdir, or upcycled from its trained subnet."""
    assert own.subnet is not None
    name = trained_folder(source)
    trained = source.path / name
    if latest_step(source.supernet) is not None or not (trained / workdir.MANIFEST).exists():
        params, step = supernet_params(source, own.vocab_sizes)
        source.progress.note(f"weights inherited from {source.supernet} at step {step:,}")
        return inherited(params, own.subnet, own.space)
    if trained == folder:
        raise UserError(
            f"{folder} holds the trained subnet to start from; name another folder with --out"
        )
    params, architecture, step = subnet_params(source, name)
    source.progress.note(f"experts upcycled from {trained} at step {step:,}")
    fresh = initial_state(own, source.config.subnet_training, source.config.seed).params
    return upcycled(params, architecture, own.subnet, fresh, own.space.gate)


def _train(
    run: Run,
    own: TrainingTarget,
    training: TrainingConfig,
    data: PreparedData,
    folder: Path,
    init_params: Params | None = None,
    profile: Span | None = None,
):
    sampling, seed = run.config.sampling, run.config.seed
    loop.train(own, training, sampling, seed, data, folder, run.progress, init_params, profile)
    # Each training takes thousands of memory mappings; Linux allows a process 65,530.
    jax.clear_caches()


def _check_space(config: RunConfig, folder: Path, kind: str) -> dict[str, Any]:
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


def _check_conversion(folder: Path, kind: str, step: int | None):
    """Refuses the folder of a killed conversion: training would start from random weights."""
    if step is not None or not (folder / workdir.MANIFEST).exists():
        return
    if workdir.CONVERTED in workdir.read(folder, kind):
        raise UserError(f"the conversion to {folder} did not finish; run launch/convert.py again")


def origin(folder: Path, name: str, step: int) -> str:
    """Describes where a folder's weights come from, for an export's manifest."""
    kind = SUPERNET if folder.name == SUPERNET else SUBNET
    source = workdir.read(folder, kind).get(workdir.CONVERTED)
    if source is None:
        return f"{name}, step {step}"
    trained_on = f", trained on to step {step}" if step else ""
    return f"{name}, converted from {source['checkpoint']}{trained_on}"


def supernet_params(run: Run, vocab_sizes: tuple[int, int]) -> tuple[Params, int]:
    """The newest weights of the run's supernet, and their step."""
    if latest_step(run.supernet) is not None:
        _check_space(run.config, run.supernet, SUPERNET)
    elif (run.path / SUBNET / workdir.MANIFEST).exists():
        raise UserError(
            f"{run.path} holds a subnet and no supernet; leave --subnet out to use the subnet"
        )
    return load_params(
        target(run.config, vocab_sizes), run.config.training, run.supernet, run.progress.note
    )


def subnet_params(run: Run, out: str = SUBNET) -> tuple[Params, Subnet, int]:
    """The newest weights of a trained subnet, its architecture, and their step."""
    folder = run.path / out
    if not (folder / workdir.MANIFEST).exists():
        raise UserError(
            f"{folder} has no trained subnet; train one with launch/train.py --subnet, or give "
            "--subnet=FILE to export one with the supernet's weights"
        )
    manifest = _check_space(run.config, folder, SUBNET)
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
