"""Trains the supernet or one subnet."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from automoe_jax.architecture.subnet import Subnet, from_json, to_json
from automoe_jax.config import RunConfig
from automoe_jax.data.tokens import PreparedData
from automoe_jax.model.extract import Params
from automoe_jax.phases import first_weights, teachers
from automoe_jax.phases.prepare import other_text, prepare
from automoe_jax.phases.run import SUBNET, SUPERNET, Run, claim
from automoe_jax.phases.weights import check_space, subnet_params, target
from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError
from automoe_jax.training import loop
from automoe_jax.training.checkpoints import latest_step
from automoe_jax.training.clock import Span
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.steps import TrainedTeacher
from automoe_jax.training.target import TrainingTarget, check_has_supernet

# Groups of the config that trained weights depend on.
_COMMON = ("seed", "data", "tokenizer", "space", "model")
SUPERNET_GROUPS, SUBNET_GROUPS = (*_COMMON, "training", "sampling"), (*_COMMON, "subnet_training")

_TEACHER_ORIGIN = "teacher_origin"  # in a subnet's manifest: where its teacher's weights come from


def settings(config: RunConfig, subnet: Subnet | None, init_from: str | None) -> dict[str, Any]:
    """All settings that a trained supernet or subnet depends on, for its manifest."""
    if subnet is None:
        started = {} if init_from is None else {"init_from": init_from}
        return {**config.groups(*SUPERNET_GROUPS), **started}
    own = {"subnet": to_json(subnet), "init_from": init_from}
    return {**config.groups(*SUBNET_GROUPS), **own}


def train_supernet(run: Run, init_from: Path | None = None, profile: Span | None = None):
    """Trains the supernet in `supernet/`, from its newest checkpoint if there is one.

    The first weights are those of the trained subnet in the workdir `init_from`, its most important
    columns and experts in front; random for None. `profile` as in `loop.train`.
    """
    config = run.config
    check_has_supernet(config.space)
    step = latest_step(run.supernet)
    if not step:  # runs of earlier versions go on with what they began with
        _check_sampling(config)
    _check_conversion(run.supernet, SUPERNET, step)
    if step == 0:  # converted weights, not trained here yet
        if init_from is not None:
            raise UserError(
                f"{run.supernet} holds converted weights to start from; leave --init_from out"
            )
        check_space(config, run.supernet, SUPERNET)
    source = None if init_from is None else dataclasses.replace(run, path=init_from)
    if source is not None and step is None:
        first_weights.check_of_supernet(source)
    origin = init_from and run.stored(init_from)
    content = settings(config, None, origin)
    if source is not None:
        content |= config.subnet_training.weights_for("init_weights")
    elif step:  # goes on, wherever it started
        stored = workdir.settings(run.supernet, SUPERNET)
        content |= {k: stored[k] for k in ("init_from", "init_weights") if k in stored}
    claim(run, SUPERNET, SUPERNET, content, begun=bool(step))
    data = prepare(run, init_from)
    supernet = target(config, data.tokenizer.vocab_sizes)
    params = None
    if source is not None and step is None:
        params = first_weights.of_supernet(source, supernet, data)
    _train(run, supernet, config.training, data, run.supernet, params, profile)


def _check_sampling(config: RunConfig):
    """Raises `UserError` for settings that would train no supernet, or do nothing in one."""
    first, steps = config.sampling.largest_first, config.training.steps
    if first >= steps:
        raise UserError(
            f"config.sampling.largest_first is {first}, but config.training.steps is {steps}: only "
            "the largest subnet would be trained; give fewer"
        )
    if config.training.inherited_experts != "first":
        raise UserError(
            f"config.training.inherited_experts is {config.training.inherited_experts!r}, but a "
            "supernet inherits none; give config.subnet_training.inherited_experts"
        )


def train_subnet(
    run: Run,
    subnet: Subnet,
    init_from: Path | None = None,
    out: str = SUBNET,
    profile: Span | None = None,
    *,
    after: str | None = None,
    teacher: Path | None = None,
    text: Path | None = None,
):
    """Trains one subnet of the space by group `subnet_training`, in the folder `out`.

    Continues from its newest checkpoint if there is one. The first weights are those of the
    supernet in the workdir `init_from`, or of its trained subnet where it has no supernet and the
    two differ in experts alone; random for None. With `after`, they are those of the same subnet in
    this folder of the run. `profile` as in `loop.train`. The subnet learns from the predictions of
    the model in the folder `teacher`, see `teachers.load`, as well as from the text, which is the
    training text of the corpus folder `text` in place of the run's. `UserError` if it goes on and
    the teacher has other weights than before.
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
        manifest = check_space(config, folder, SUBNET)
        if from_json(manifest["config"]["subnet"]) != subnet:
            raise UserError(f"{folder} holds another subnet; name another folder with --out")
    source = after or (init_from and run.stored(init_from))
    content, tokenizer_from = settings(config, subnet, source), init_from
    if init_from is not None:
        first = first_weights.group_of(dataclasses.replace(run, path=init_from))
        content |= first.weights_for("init_weights")
    if teacher is not None:
        content["teacher"] = run.stored(teacher)
        content |= _teacher_origin(folder, step, config.subnet_training, teacher)
        tokenizer_from = init_from or teachers.home(teacher)
    if text is not None:
        content["text"] = run.stored(text)
    claim(run, folder, SUBNET, content, begun=bool(step), added=[_TEACHER_ORIGIN])
    data = prepare(run, tokenizer_from)
    if text is not None:
        data = dataclasses.replace(data, train=other_text(run, text))
    own = target(config, data.tokenizer.vocab_sizes, subnet)
    params = None
    if after is not None and step is None:
        params, _, _ = subnet_params(run, after)
    elif init_from is not None and step is None:
        source_run = dataclasses.replace(run, path=init_from)
        params = first_weights.of_subnet(source_run, own, folder, data)
    taught_by = teacher and functools.partial(teachers.load, teacher, data.tokenizer, run.progress)
    _train(run, own, config.subnet_training, data, folder, params, profile, taught_by)


def _teacher_origin(
    folder: Path, step: int | None, training: TrainingConfig, teacher: Path
) -> dict[str, str]:
    """Where the teacher's weights come from, for the manifest of a subnet's folder.

    Of a training that has ended, what its manifest says: the teacher may be gone, or another one.
    `UserError` if it is another one, and the training has not ended.
    """
    begun = step is not None and (folder / workdir.MANIFEST).exists()
    stored = workdir.settings(folder, SUBNET).get(_TEACHER_ORIGIN) if begun else None
    if begun and loop.has_ended(folder, training):
        return {} if stored is None else {_TEACHER_ORIGIN: stored}
    found = teachers.origin(teacher)
    if stored not in (None, found):
        raise UserError(
            f"{folder} has learned from another model in {teacher}: it was {stored!r} and is "
            f"{found!r}; give that one, or train anew in another folder"
        )
    return {_TEACHER_ORIGIN: found}


def _train(
    run: Run,
    own: TrainingTarget,
    training: TrainingConfig,
    data: PreparedData,
    folder: Path,
    init_params: Params | None = None,
    profile: Span | None = None,
    teacher: Callable[[], TrainedTeacher] | None = None,
):
    given = run.config.sampling, run.config.seed, data, folder, run.progress
    loop.train(own, training, *given, init_params, profile, teacher)
    # Each training takes thousands of memory mappings; Linux allows a process 65,530.
    jax.clear_caches()


def _check_conversion(folder: Path, kind: str, step: int | None):
    """Refuses the folder of a killed conversion: training would start from random weights."""
    if step is not None or not (folder / workdir.MANIFEST).exists():
        return
    if workdir.CONVERTED in workdir.read(folder, kind):
        raise UserError(f"the conversion to {folder} did not finish; run launch/convert.py again")
