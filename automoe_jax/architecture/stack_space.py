"""`StackSpace`: the choices of one stack of a search space, encoder or decoder."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from automoe_jax.architecture.subnet import STACKS, Decoder, Encoder, SubnetError
from automoe_jax.system.errors import UserError

Choices = tuple[int, ...]
Pick = Callable[[Choices], int]


class SpaceError(UserError):
    """A search space without a single architecture, or one that contradicts itself."""


@dataclasses.dataclass(frozen=True)
class StackSpace:
    """The choices of one stack, as in `SearchSpace`; `heads` has those of each head field."""

    side: str  # "encoder" or "decoder"
    embed_dims: Choices
    depths: Choices
    heads: Mapping[str, Choices]
    cross_spans: Choices  # empty for the encoder
    experts: Choices
    placement: Choices
    ffn_dims: Choices
    top_k: Choices
    expert_sizes: str
    identity_experts: bool

    def check(self, qkv_dim: int):
        """Raises `SpaceError` where heads do not divide `qkv_dim` or placement misses layers."""
        for name, choices in self.heads.items():
            # Attention scores are computed at the least common multiple of the choices.
            heads = math.lcm(*choices)
            if qkv_dim % heads:
                raise SpaceError(
                    f"space.{self.side}_{name} is {choices}, whose least common multiple {heads} "
                    f"does not divide space.qkv_dim {qkv_dim}"
                )
        if self.placement and len(self.placement) != max(self.depths):
            raise SpaceError(
                f"space.{self.side}_placement has {len(self.placement)} entries; one for each of "
                f"the {max(self.depths)} layers is needed"
            )

    def attention(self, encoder_depth: int) -> dict[str, Choices]:
        """Choices of a layer's attention fields; spans are cut to the encoder's depth."""
        spans = tuple(min(span, encoder_depth) for span in self.cross_spans)
        return {**self.heads, "cross_span": spans} if spans else dict(self.heads)

    def expert_counts(self, i: int) -> Choices:
        """The numbers of experts that layer `i` may have."""
        return (self.placement[i],) if self.placement else self.experts

    @property
    def expert_dims(self) -> Choices:
        """The FFN sizes of one expert in a fractional layer, 0 included where allowed."""
        return (0, *self.ffn_dims) if self.identity_experts else self.ffn_dims

    def top_ks(self, n_experts: int) -> Choices:
        """The experts per token of a layer with `n_experts`."""
        return tuple(sorted({min(k, n_experts) for k in self.top_k}))

    @property
    def max_experts(self) -> int:
        """The largest number of experts of a layer."""
        return max(max(self.expert_counts(i)) for i in range(max(self.depths)))

    def size(self, depth: int, encoder_depth: int) -> int:
        """The number of different stacks of `depth` layers."""
        attention = math.prod(len(set(x)) for x in self.attention(encoder_depth).values())
        return len(self.embed_dims) * math.prod(
            attention * sum(self._n_expert_sizes(n) * len(self.top_ks(n)) for n in counts)
            for counts in map(self.expert_counts, range(depth))
        )

    def _n_expert_sizes(self, n_experts: int) -> int:
        if self.expert_sizes == "fractional":
            return len(self.expert_dims) ** n_experts
        return len(self.ffn_dims) * (2 if self.identity_experts and n_experts > 1 else 1)

    def corner(self, pick: Pick, pick_heads: Pick, encoder_depth: int | None = None):
        """The stack with every dimension picked by `min` or `max`; the encoder takes no depth."""
        depth = pick(self.depths)
        attention = {
            name: (pick_heads if name in self.heads else pick)(choices)
            for name, choices in self.attention(encoder_depth or depth).items()
        }
        stack_type, layers = STACKS[self.side], []
        for i in range(depth):
            experts = (pick(self.ffn_dims),) * pick(self.expert_counts(i))
            if pick is min and self.identity_experts:
                experts = self._with_identity(experts, i)
            top_k = pick(self.top_ks(len(experts)))
            layers.append(stack_type.layer_type(**attention, experts=experts, top_k=top_k))
        return stack_type(pick(self.embed_dims), tuple(layers))

    def _with_identity(self, experts: Choices, i: int) -> Choices:
        """The cheapest experts of layer `i`, from those without identity experts."""
        if self.expert_sizes == "fractional":
            return (0,) * len(experts)
        several = [n for n in self.expert_counts(i) if n > 1]
        return (0, *[experts[0]] * (min(several) - 1)) if several else experts

    def validate(self, stack: Encoder | Decoder, encoder_depth: int):
        """Raises `SubnetError` naming the first field outside the choices."""
        _check(stack.embed_dim, self.embed_dims, f"{self.side}.embed_dim")
        _check(len(stack.layers), self.depths, f"the number of {self.side}.layers")
        attention = self.attention(encoder_depth)
        for i, layer in enumerate(stack.layers):
            where, n = f"{self.side}.layers[{i}]", len(layer.experts)
            for name, choices in attention.items():
                _check(getattr(layer, name), choices, f"{where}.{name}")
            _check(n, self.expert_counts(i), f"the number of {where}.experts")
            for j, size in enumerate(layer.experts):
                _check(size, self.expert_dims, f"{where}.experts[{j}]")
            if self.expert_sizes == "standard":
                sizes = layer.experts[1:] if n > 1 and layer.experts[0] == 0 else layer.experts
                if len(set(sizes)) > 1 or 0 in sizes:
                    raise SubnetError(
                        f"{where}.experts is {list(layer.experts)}; the space has standard experts:"
                        " all of one size" + ", the first may be 0" * self.identity_experts
                    )
            _check(layer.top_k, self.top_ks(n), f"{where}.top_k")


def _check(value: int, choices: Iterable[int], where: str):
    if value not in choices:
        allowed = ", ".join(map(str, dict.fromkeys(choices)))
        raise SubnetError(f"{where} is {value}; the space allows {allowed}")
