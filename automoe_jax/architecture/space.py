"""`SearchSpace`: the choices per dimension; samples, mutates, crosses over, validates subnets."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

from automoe_jax.architecture import variation
from automoe_jax.architecture.stack_space import Choices, SpaceError, StackSpace
from automoe_jax.architecture.subnet import CELLS, STACKS, Subnet, SubnetError, doubled_heads
from automoe_jax.architecture.variation import Rng

GATES = ("probability", "count", "normalised")

# Allowed values of the fields that are not lists of choices.
_ALLOWED = {
    "expert_sizes": ("fractional", "standard"),
    "share_embeddings": ("all", "decoder", "none"),
    "sharing": ("front", "own", "means", "common"),
    "gate": GATES,
    "identity_experts": (True, False),
    "cell": CELLS,
}


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The choices of every elastic dimension; the defaults are the paper's Table 2.

    The Q/K/V width is fixed. Heads are chosen per layer, FFN sizes per expert.

    Attributes:
      qkv_dim: width of queries, keys and values, of all heads together.
      encoder_embed_dims, decoder_embed_dims: widths of a side, alike in all its layers.
      encoder_depths, decoder_depths: numbers of layers.
      encoder_heads, decoder_self_heads, decoder_cross_heads: of an attention, per layer.
      cross_spans: last encoder layers attended to, per decoder layer.
      encoder_experts, decoder_experts: numbers of experts, per layer; (1,) is dense (HAT).
      encoder_placement, decoder_placement: the number of experts of each layer where it is
        fixed, as (1, 2, 1, 2, 1, 2); empty where it is searched.
      expert_sizes: "fractional" gives each expert its own size, "standard" one size to all
        experts of a layer.
      encoder_ffn_dims, decoder_ffn_dims: hidden units, per expert or dense FFN.
      identity_experts: adds experts of size 0, which return their input: any expert of a
        fractional layer, the first of a standard layer of two or more.
      encoder_top_k, decoder_top_k: experts per token; a layer takes at most those it has.
      share_embeddings: "all" has one table for source, target and output (the WMT models),
        "decoder" one for the source and one for target and output, "none" three (the IWSLT
        models); the last two take a vocabulary per language.
      ffn_scale, attention_scale: factors on the output of every expert and dense FFN, identity
        experts excepted, and of every attention; 1 is the published model. They are part of what
        the weights mean while they are trained; an export has them inside its weights. See
        docs/experts.md.
      sharing: how numbers of experts share weights in a supernet. "front": a layer of n takes the
        first n experts (published). "own": each number has experts of its own. "means": the means
        of n groups of the largest number's. "common": one expert alone is the common one, and each
        of several is the common one plus a difference of its own. Routers likewise. All but "front"
        need the same choices in all layers of a stack, so no placement.
      gate: the factor on an expert's output, where a layer has several. "probability" is p, its
        router probability (published); "count" is p times the number of experts of the layer, so
        1 where all are alike; "normalised" is p over the sum of the p of the token's experts, so 1
        with top_k 1, with the gradient of p over a constant. With top_k 1 the last two have the
        scale of a dense FFN whatever the number of experts.
      cell: "transformer", or "evolved" for the cells of the Evolved Transformer (So et al. 2019).
        These have one FFN each, and no supernet: their architectures are trained by themselves.
    """

    qkv_dim: int = 512
    encoder_embed_dims: tuple[int, ...] = (512, 640)
    decoder_embed_dims: tuple[int, ...] = (512, 640)
    encoder_depths: tuple[int, ...] = (6,)
    decoder_depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    encoder_heads: tuple[int, ...] = (4, 8)
    decoder_self_heads: tuple[int, ...] = (4, 8)
    decoder_cross_heads: tuple[int, ...] = (4, 8)
    cross_spans: tuple[int, ...] = (1, 2, 3)
    encoder_experts: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    decoder_experts: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    encoder_placement: tuple[int, ...] = ()
    decoder_placement: tuple[int, ...] = ()
    encoder_ffn_dims: tuple[int, ...] = (1024, 2048, 3072)
    decoder_ffn_dims: tuple[int, ...] = (1024, 2048, 3072)
    expert_sizes: str = "fractional"
    identity_experts: bool = False
    encoder_top_k: tuple[int, ...] = (1,)
    decoder_top_k: tuple[int, ...] = (1,)
    share_embeddings: str = "all"
    ffn_scale: float = 1.0
    attention_scale: float = 1.0
    sharing: str = "front"
    gate: str = "probability"
    cell: str = "transformer"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(field.default, tuple):
                choices = _checked(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, choices)
        _check_positive("qkv_dim", self.qkv_dim)
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:
                listed = ", ".join(map(str, allowed))
                raise SpaceError(f"space.{name} is {value!r}; allowed: {listed}")
        for name in ("ffn_scale", "attention_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise SpaceError(f"space.{name} is {getattr(self, name)}; allowed: above 0")
        if self.cell == "evolved":
            self._check_evolved()
        for stack in self.stacks:
            stack.check(self.qkv_dim)
            if self.sharing != "front" and stack.placement:
                raise SpaceError(
                    f"space.sharing is {self.sharing!r} and space.{stack.side}_placement is given: "
                    "they exclude each other; leave one out"
                )
        if self.cross_spans[0] > self.encoder_depths[0]:
            raise SpaceError(
                f"space.cross_spans starts at {self.cross_spans[0]}, but an encoder may have only "
                f"{self.encoder_depths[0]} layer(s)"
            )

    def _check_evolved(self):
        """Raises `SpaceError` naming a field that evolved cells do not have."""
        only: dict[str, Any] = {
            "encoder_experts": (1,), "decoder_experts": (1,), "cross_spans": (1,),
            "identity_experts": False, "ffn_scale": 1, "attention_scale": 1,
        }  # fmt: skip
        for name, allowed in only.items():
            if getattr(self, name) != allowed:
                raise SpaceError(
                    f"space.cell is evolved and space.{name} is {getattr(self, name)}; evolved "
                    f"cells have {allowed}"
                )
        for name in ("encoder_embed_dims", "decoder_embed_dims"):
            if odd := [dim for dim in getattr(self, name) if dim % 2]:
                raise SpaceError(f"space.{name} has {odd[0]}; evolved cells need even widths")
        for heads in self.decoder_self_heads:
            if self.qkv_dim % doubled_heads(heads):
                raise SpaceError(
                    f"space.decoder_self_heads has {heads}, and an evolved cell also has attention "
                    f"of {doubled_heads(heads)} heads, which do not divide {self.qkv_dim}"
                )

    @functools.cached_property
    def stacks(self) -> tuple[StackSpace, StackSpace]:
        """The choices of both stacks, the encoder first."""
        return _stack_space(self, "encoder"), _stack_space(self, "decoder")

    def size(self) -> int:
        """The number of different subnets."""
        depths = itertools.product(self.encoder_depths, self.decoder_depths)
        encoder, decoder = self.stacks
        return sum(encoder.size(e, e) * decoder.size(d, e) for e, d in depths)

    def hull(self) -> Subnet:
        """The architecture that bounds every subnet: the shapes of the supernet's weights.

        Its heads are the least common multiple of the choices, so it need not be in the space.
        """
        if self.cell == "evolved":  # no supernet, so no heads to split
            return self._corner(max, max)
        return self._corner(max, lambda heads: math.lcm(*heads))

    def largest(self) -> Subnet:
        """The largest subnet: every dimension at its maximum."""
        return self._corner(max, max)

    def smallest(self) -> Subnet:
        """The subnet with the fewest FLOPs: every dimension at its minimum, or identity."""
        return self._corner(min, min)

    def _corner(self, pick: Callable[..., int], pick_heads: Callable[..., int]) -> Subnet:
        encoder = self.stacks[0].corner(pick, pick_heads)
        decoder = self.stacks[1].corner(pick, pick_heads, len(encoder.layers))
        return Subnet(encoder, decoder, self.qkv_dim, self.cell)

    def shapes(self) -> list["SearchSpace"]:
        """A space for each combination of embedding widths and depths, with these fixed."""
        names = "encoder_embed_dims", "decoder_embed_dims", "encoder_depths", "decoder_depths"
        spaces = []
        for sizes in itertools.product(*(getattr(self, name) for name in names)):
            fixed = {name: (size,) for name, size in zip(names, sizes, strict=True)}
            for name, depth in (("encoder_placement", sizes[2]), ("decoder_placement", sizes[3])):
                fixed[name] = getattr(self, name)[:depth]
            spaces.append(dataclasses.replace(self, **fixed))
        return spaces

    def sample(self, rng: Rng, experts_bias: float = 0.0, depth_bias: float = 0.0) -> Subnet:
        """A subnet with every dimension drawn uniformly; biases as in `SamplingConfig`."""
        return variation.sample(self.stacks, self.qkv_dim, self.cell, rng, experts_bias, depth_bias)

    def mutate(self, subnet: Subnet, rng: Rng, probability: float) -> Subnet:
        """A copy with each dimension drawn anew with the given probability."""
        return variation.mutate(self.stacks, subnet, rng, probability)

    def crossover(self, a: Subnet, b: Subnet, rng: Rng) -> Subnet:
        """A child that takes each dimension from one of its parents by a fair coin."""
        return variation.crossover(self.stacks, a, b, rng)

    def validate(self, subnet: Subnet):
        """Raises `SubnetError` naming the first field outside the space and the allowed values."""
        if subnet.qkv_dim != self.qkv_dim:
            raise SubnetError(f"qkv_dim is {subnet.qkv_dim}; the space allows {self.qkv_dim}")
        if subnet.cell != self.cell:
            raise SubnetError(f"cell is {subnet.cell}; the space has space.cell={self.cell}")
        for space, (_, stack) in zip(self.stacks, subnet.stacks, strict=True):
            space.validate(stack, len(subnet.encoder.layers))


def _stack_space(space: SearchSpace, side: str) -> StackSpace:
    def own(*names: str) -> dict[str, Any]:
        return {name: getattr(space, f"{side}_{name}") for name in names}

    return StackSpace(
        side=side,
        heads=own(*STACKS[side].layer_type.HEADS),
        cross_spans=space.cross_spans if side == "decoder" else (),
        expert_sizes=space.expert_sizes,
        identity_experts=space.identity_experts,
        **own("embed_dims", "depths", "experts", "placement", "ffn_dims", "top_k"),
    )


def _checked(name: str, value: Any) -> Choices:
    """The choices of a field: sorted, each once; a placement keeps its order."""
    placement = name.endswith("_placement")
    try:
        values = tuple(value)
    except TypeError:
        raise SpaceError(f"space.{name} is {value!r}; give a list") from None
    if not values and not placement:
        raise SpaceError(f"space.{name} is empty; at least one choice is needed")
    for number in values:
        _check_positive(name, number)
    return values if placement else tuple(sorted(set(values)))


def _check_positive(name: str, value: Any):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpaceError(f"space.{name} has {value!r}; positive integers are allowed")
