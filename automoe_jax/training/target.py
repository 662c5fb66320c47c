"""What a training run trains, and its state before the first step."""

import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from automoe_jax.architecture.active import ActiveSubnet, to_active
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.model.extract import extract
from automoe_jax.model.scales import scales_of
from automoe_jax.model.stand_alone import StandAlone, stand_alone
from automoe_jax.model.supernet import Supernet
from automoe_jax.system.errors import UserError
from automoe_jax.training import optimizer
from automoe_jax.training.config import ModelConfig, TrainingConfig
from automoe_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainingTarget:
    """The supernet of a search space, or one subnet of it."""

    space: SearchSpace
    vocab_sizes: tuple[int, int]  # of source and target
    model: ModelConfig
    subnet: Subnet | None = None

    def __post_init__(self):
        source, target = self.vocab_sizes
        if self.space.share_embeddings == "all" and source != target:
            raise UserError(
                f"the vocabularies of source and target have {source:,} and {target:,} entries, "
                "but space.share_embeddings is all, which needs one vocabulary; "
                "use --config.space.share_embeddings=none (or decoder)"
            )
        if self.subnet is None:
            check_has_supernet(self.space)

    @property
    def extracted(self) -> bool:
        """Whether its first weights are a part of a supernet's."""
        return self.subnet is not None and self.subnet.cell != "evolved"

    @property
    def hull(self) -> Subnet:
        return self.space.hull()

    def module(
        self, dtype: str = "float32", *, remat: bool = False, spread: int = 1
    ) -> Supernet | StandAlone:
        """The Linen module, with activations and products of a dtype; others as in `Supernet`."""
        model = self.model
        rates = model.dropout, model.attention_dropout
        if self.subnet is None:
            more = model.router_jitter, dtype, remat, spread
            return Supernet(self.space, self.vocab_sizes, *rates, *more)
        return stand_alone(
            self.subnet, self.vocab_sizes,
            (self.hull.encoder.embed_dim, self.hull.decoder.embed_dim),
            share_embeddings=self.space.share_embeddings, scales=scales_of(self.space),
            dropouts=rates, router_jitter=model.router_jitter, dtype=dtype, remat=remat,
        )  # fmt: skip

    def active(self, subnet: Subnet) -> ActiveSubnet | None:
        """The argument that runs a subnet in the module; None for a stand-alone model."""
        return None if self.subnet is not None else to_active(subnet, self.hull)


def check_has_supernet(space: SearchSpace):
    """Raises `UserError` if the architectures of a space share no weights."""
    if space.cell == "evolved":
        raise UserError(
            "space.cell is evolved, and these models have no supernet: train an architecture with "
            "launch/train.py --subnet=FILE, and export it without --subnet"
        )


def initial_state(target: TrainingTarget, config: TrainingConfig, seed: int) -> TrainState:
    """State of step 0; a subnet's weights are extracted from those of a new supernet.

    Evolved cells have none, and weights of their own.
    """
    make = _maker(_supernet(target), config)
    with made_whole(config):
        return _own(target, config, make(jax.random.key(seed)))


def made_whole(config: TrainingConfig) -> Any:
    """The context in which a whole state is made: on the CPU where no device may hold it."""
    if config.expert_parallel == 1:
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        raise UserError(
            "training.expert_parallel needs JAX's CPU backend beside the devices, to make the "
            "first weights: leave JAX_PLATFORMS out, or add cpu to it, as JAX_PLATFORMS=tpu,cpu"
        ) from None


def _supernet(target: TrainingTarget) -> TrainingTarget:
    """The supernet whose first weights a target has; a subnet's shares none of them."""
    if not target.extracted:
        return target
    return dataclasses.replace(
        target, subnet=None, space=dataclasses.replace(target.space, sharing="front")
    )


def _own(target: TrainingTarget, config: TrainingConfig, state: TrainState) -> TrainState:
    """What a target has of a supernet's state."""
    if target.subnet is None or not target.extracted:
        return state
    return with_params(state, extract(state.params, target.subnet, target.hull), config)


@functools.lru_cache(maxsize=4)
def _maker(target: TrainingTarget, config: TrainingConfig) -> Any:
    """Makes the first state of a target of a key. Cached, as JAX traces each function anew."""
    module, tx = target.module(), optimizer.make(config)

    # It runs once: less optimised, it compiles in half the time, to the same bits. What XLA_FLAGS
    # say goes before.
    level = "xla_backend_optimization_level"
    options = {} if level in os.environ.get("XLA_FLAGS", "") else {level: 1}

    @functools.partial(jax.jit, compiler_options=options)
    def make(key):
        ids, largest = jnp.full((1, 2), 4, jnp.int32), target.active(target.hull)
        params = module.init({"params": key}, ids, ids, largest)["params"]
        average = jax.tree.map(jnp.copy, params) if config.ema_decay else ()
        return TrainState(jnp.int32(0), params, tx.init(params), average)

    return make


def with_params(state: TrainState, params: Any, config: TrainingConfig) -> TrainState:
    """A state of step 0 with other weights."""
    average = jax.tree.map(jnp.copy, params) if config.ema_decay else ()
    return TrainState(state.step, params, optimizer.make(config).init(params), average)


@functools.lru_cache(maxsize=4)
def abstract_state(target: TrainingTarget, config: TrainingConfig, seed: int) -> TrainState:
    """Shapes and dtypes of the state, without allocating it."""
    make = _maker(_supernet(target), config)
    state = make.eval_shape(jax.random.key(seed))
    return jax.eval_shape(functools.partial(_own, target, config), state)


def check_shapes(params: Any, abstract: Any):
    """Raises `ValueError` if `params` do not have the structure and shapes of `abstract`."""
    if jax.tree.structure(params) != jax.tree.structure(abstract):
        raise ValueError("the weights are not those of the model")
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(abstract), strict=True)
    wrong = [jax.tree_util.keystr(path) for (path, x), y in leaves if x.shape != y.shape]
    if wrong:
        raise ValueError(f"the shapes of {', '.join(wrong)} are not those of the model")
