"""The first weights of a training, from those of another."""

import dataclasses
from pathlib import Path

import numpy as np

from automoe_jax.data.tokens import PreparedData, TokenPairs
from automoe_jax.model.extract import Params, inherited
from automoe_jax.model.importance import best_first
from automoe_jax.model.pruning import pruned, with_all_experts
from automoe_jax.model.upcycle import supernet_started, upcycled
from automoe_jax.phases.run import SUBNET, Run
from automoe_jax.phases.weights import check_space, subnet_params, supernet_params, trained_folder
from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError
from automoe_jax.training.checkpoints import latest_step
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.evaluation import take_pairs
from automoe_jax.training.importance import importance_of
from automoe_jax.training.routing import routing_of
from automoe_jax.training.target import TrainingTarget, initial_state, made_whole

_PAIRS = 1000  # on which importance (training text) and use (validation text) are measured


def group_of(source: Run) -> TrainingConfig:
    """The training whose `final_weights` a subnet starts from in a workdir."""
    has_supernet = latest_step(source.supernet) is not None
    return source.config.training if has_supernet else source.config.subnet_training


def of_subnet(source: Run, own: TrainingTarget, folder: Path, data: PreparedData) -> Params:
    """A subnet's weights in the supernet of a workdir, or upcycled from its trained subnet.

    Of the supernet's experts, those that `subnet_training.inherited_experts` says.
    """
    assert own.subnet is not None
    name = trained_folder(source)
    trained = source.path / name
    if latest_step(source.supernet) is not None or not (trained / workdir.MANIFEST).exists():
        params, step = supernet_params(source, own.vocab_sizes)
        source.progress.note(f"weights inherited from {source.supernet} at step {step:,}")
        kind = source.config.subnet_training.inherited_experts
        if kind == "first":
            return inherited(params, own.subnet, own.space)
        return _by_use(own, params, data, source.config.subnet_training, merge=kind == "merged")
    if trained == folder:
        raise UserError(
            f"{folder} holds the trained subnet to start from; name another folder with --out"
        )
    kind = source.config.subnet_training.inherited_experts
    if kind != "first":
        raise UserError(
            f"subnet_training.inherited_experts is {kind!r}, but {source.path} has no supernet to "
            "inherit from; leave it out, or name the workdir of one with --init_from"
        )
    params, architecture, step = subnet_params(source, name)
    if own.subnet.cell == "evolved":
        if architecture != own.subnet:
            raise UserError(
                f"{trained} holds another evolved architecture, and these share no weights; leave "
                "--init_from out"
            )
        source.progress.note(f"weights of {trained} at step {step:,}")
        return params
    source.progress.note(f"experts upcycled from {trained} at step {step:,}")
    fresh = initial_state(own, source.config.subnet_training, source.config.seed).params
    return upcycled(params, architecture, own.subnet, fresh, own.space.gate)


def _by_use(
    own: TrainingTarget, params: Params, data: PreparedData, config: TrainingConfig, *, merge: bool
) -> Params:
    """A subnet's weights from all experts of the supernet's."""
    assert own.subnet is not None
    full = with_all_experts(own.subnet, own.hull)
    weights = inherited(params, full, own.space)
    pairs = _measured_on(data.valid)
    routings = routing_of(dataclasses.replace(own, subnet=full), weights, pairs, config)
    loads = [routing.load_E for routing in routings]
    return pruned(weights, full, own.subnet, loads, merge=merge)


def check_of_supernet(source: Run):
    """Raises `UserError` if a workdir has no trained subnet of the same space."""
    folder = source.path / trained_folder(source)
    if latest_step(folder) is None or not (folder / workdir.MANIFEST).exists():
        raise UserError(
            f"{source.path} has no trained subnet for the supernet to start from; train one there "
            "with launch/train.py --subnet, or leave --init_from out"
        )
    check_space(source.config, folder, SUBNET)


def of_supernet(source: Run, own: TrainingTarget, data: PreparedData) -> Params:
    """A supernet's weights from the trained subnet of a workdir, its best columns in front."""
    name = trained_folder(source)
    params, subnet, step = subnet_params(source, name)
    pairs = _measured_on(data.train)
    config = source.config.training
    trained = dataclasses.replace(own, subnet=subnet)
    params, subnet = best_first(params, subnet, importance_of(trained, params, pairs, config))
    source.progress.note(
        f"weights from {source.path / name} at step {step:,}, its best FFN columns first"
    )
    fresh = initial_state(own, config, source.config.seed).params
    with made_whole(config):
        return supernet_started(params, subnet, fresh, own.space)


def _measured_on(pairs: TokenPairs) -> TokenPairs:
    return take_pairs(pairs, np.arange(min(_PAIRS, len(pairs))))
