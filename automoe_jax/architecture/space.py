"""`SearchSpace`: the choices per dimension; samples, mutates, crosses over, validates subnets."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from automoe_jax.architecture.subnet import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Subnet,
    SubnetError,
)
from automoe_jax.system.errors import UserError

Rng = np.random.Generator
# What `share_embeddings` may be.
SHARED = ("all", "decoder", "none")


class SpaceError(UserError):
    """A search space that contains no architecture, or contradicts itself."""


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The choices of every elastic dimension; the defaults are the paper's Table 2.

    Attributes:
      qkv_dim: the fixed Q/K/V width.
      encoder_embed_dims, decoder_embed_dims: embedding widths.
      encoder_depths, decoder_depths: numbers of layers.
      encoder_heads, decoder_self_heads, decoder_cross_heads: attention heads, per layer.
      cross_spans: last encoder layers attended to, per decoder layer.
      encoder_experts, decoder_experts: numbers of experts, per layer; (1,) is dense (HAT).
      encoder_placement, decoder_placement: the number of experts of each layer where it is
        fixed, as (1, 2, 1, 2, 1, 2); empty where it is searched.
      encoder_ffn_dims, decoder_ffn_dims: FFN sizes, per expert.
      expert_sizes: "fractional" gives each expert its own size, "standard" one size to all
        experts of a layer.
      identity_experts: adds experts of size 0, which return their input: any expert of a
        fractional layer, the first of a standard layer of two or more.
      encoder_top_k, decoder_top_k: experts per token; a layer takes at most those it has.
      share_embeddings: "all" has one table for source, target and output (the WMT models),
        "decoder" one for the source and one for target and output, "none" three (the IWSLT
        models); the last two take a vocabulary per language.

    Raises:
      SpaceError: names the field.
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("expert_sizes", "identity_experts", "share_embeddings"):
                continue
            if field.name == "qkv_dim":
                values: Sequence[int] = (value,)
            else:
                try:
                    values = tuple(value)
                except TypeError:
                    raise SpaceError(f"space.{field.name} is {value!r}; give a list") from None
                # Placement keeps its order; choices are a set.
                values = values if "placement" in field.name else tuple(sorted(set(values)))
                object.__setattr__(self, field.name, values)
            if not values and "placement" not in field.name:
                raise SpaceError(f"space.{field.name} is empty; at least one choice is needed")
            for v in values:
                if isinstance(v, bool) or not isinstance(v, int) or v < 1:
                    raise SpaceError(f"space.{field.name} has {v!r}; positive integers are allowed")
        if self.expert_sizes not in ("fractional", "standard"):
            raise SpaceError(
                f"space.expert_sizes is {self.expert_sizes!r}; allowed: fractional, standard"
            )
        if self.share_embeddings not in SHARED:
            raise SpaceError(
                f"space.share_embeddings is {self.share_embeddings!r}; allowed: {', '.join(SHARED)}"
            )
        if not isinstance(self.identity_experts, bool):
            raise SpaceError(
                f"space.identity_experts is {self.identity_experts!r}; allowed: True, False"
            )
        for name in ("encoder_heads", "decoder_self_heads", "decoder_cross_heads"):
            # All choices must divide, and so must their least common multiple: it is the split
            # that attention scores are computed at.
            heads = math.lcm(*getattr(self, name))
            if self.qkv_dim % heads:
                raise SpaceError(
                    f"space.{name} is {getattr(self, name)}, whose least common multiple {heads} "
                    f"does not divide space.qkv_dim {self.qkv_dim}"
                )
        for side in ("encoder", "decoder"):
            placement = getattr(self, f"{side}_placement")
            depth = max(getattr(self, f"{side}_depths"))
            if placement and len(placement) != depth:
                raise SpaceError(
                    f"space.{side}_placement has {len(placement)} entries; one for each of the "
                    f"{depth} layers is needed"
                )
        if self.cross_spans[0] > self.encoder_depths[0]:
            raise SpaceError(
                f"space.cross_spans starts at {self.cross_spans[0]}, but an encoder may have only "
                f"{self.encoder_depths[0]} layer(s)"
            )

    # --- what one layer may have -------------------------------------------------------------

    def experts_choices(self, side: str, i: int) -> tuple[int, ...]:
        """The numbers of experts that layer `i` of the encoder or decoder may have."""
        placement = getattr(self, f"{side}_placement")
        return (placement[i],) if placement else getattr(self, f"{side}_experts")

    def size_choices(self, side: str) -> tuple[int, ...]:
        """The sizes that one expert of a fractional layer may have, 0 included where allowed."""
        sizes = getattr(self, f"{side}_ffn_dims")
        return (0, *sizes) if self.identity_experts else sizes

    def top_k_choices(self, side: str, n_experts: int) -> tuple[int, ...]:
        """The experts per token that a layer of so many experts may have."""
        return tuple(sorted({min(k, n_experts) for k in getattr(self, f"{side}_top_k")}))

    def max_experts(self, side: str) -> int:
        """The most experts of any layer."""
        depth = max(getattr(self, f"{side}_depths"))
        return max(max(self.experts_choices(side, i)) for i in range(depth))

    def size(self) -> int:
        """How many different subnets there are."""

        def layer(side: str, i: int) -> int:
            total = 0
            for n in self.experts_choices(side, i):
                sizes = len(getattr(self, f"{side}_ffn_dims"))
                if self.expert_sizes == "fractional":
                    sizes = len(self.size_choices(side)) ** n
                elif self.identity_experts and n > 1:
                    sizes *= 2
                total += sizes * len(self.top_k_choices(side, n))
            return total

        decoder_heads = len(self.decoder_self_heads) * len(self.decoder_cross_heads)
        total = 0
        for e_depth in self.encoder_depths:
            encoders = math.prod(
                len(self.encoder_heads) * layer("encoder", i) for i in range(e_depth)
            )
            per_layer = decoder_heads * len(self._spans(e_depth))
            decoders = sum(
                math.prod(per_layer * layer("decoder", i) for i in range(depth))
                for depth in self.decoder_depths
            )
            total += encoders * decoders
        return total * len(self.encoder_embed_dims) * len(self.decoder_embed_dims)

    # --- the corners -------------------------------------------------------------------------

    def hull(self) -> Subnet:
        """The architecture that bounds every subnet: the shapes of the supernet's weights.

        Its heads are the least common multiple of the choices, so it need not be in the space.
        """
        return self._corner(max, math.lcm)

    def largest(self) -> Subnet:
        """The largest subnet: every dimension at its maximum."""
        return self._corner(max, max)

    def smallest(self) -> Subnet:
        """The subnet with the fewest FLOPs: every dimension at its minimum.

        With identity experts that is a layer of size 0 where sizes are fractional, and one expert
        beside an identity expert, if a layer may have two, where they are standard.
        """
        corner = self._corner(min, min)
        if not self.identity_experts:
            return corner

        def thinned(side: str, layers):
            for i, layer in enumerate(layers):
                experts = tuple(0 for _ in layer.experts)
                if self.expert_sizes == "standard":
                    counts = [n for n in self.experts_choices(side, i) if n > 1]
                    size = layer.experts[0]
                    experts = (0, *[size] * (min(counts) - 1)) if counts else layer.experts
                top_k = min(self.top_k_choices(side, len(experts)))
                yield dataclasses.replace(layer, experts=experts, top_k=top_k)

        encoder, decoder = corner.encoder, corner.decoder
        return dataclasses.replace(
            corner,
            encoder=Encoder(encoder.embed_dim, tuple(thinned("encoder", encoder.layers))),
            decoder=Decoder(decoder.embed_dim, tuple(thinned("decoder", decoder.layers))),
        )

    def _corner(self, pick, pick_heads: Callable[..., int]) -> Subnet:
        depth = pick(self.encoder_depths)

        def experts(side: str, i: int) -> tuple[int, ...]:
            n = pick(self.experts_choices(side, i))
            return (pick(getattr(self, f"{side}_ffn_dims")),) * n

        def heads(choices: tuple[int, ...]) -> int:
            return choices[0] if len(choices) == 1 else pick_heads(*choices)

        encoder = tuple(
            EncoderLayer(
                heads(self.encoder_heads),
                experts("encoder", i),
                pick(self.top_k_choices("encoder", len(experts("encoder", i)))),
            )
            for i in range(depth)
        )
        decoder = tuple(
            DecoderLayer(
                heads(self.decoder_self_heads),
                heads(self.decoder_cross_heads),
                min(pick(self.cross_spans), depth),
                experts("decoder", i),
                pick(self.top_k_choices("decoder", len(experts("decoder", i)))),
            )
            for i in range(pick(self.decoder_depths))
        )
        return Subnet(
            Encoder(pick(self.encoder_embed_dims), encoder),
            Decoder(pick(self.decoder_embed_dims), decoder),
            self.qkv_dim,
        )

    def shapes(self) -> list["SearchSpace"]:
        """A space for each combination of embedding widths and depths, with these fixed."""
        return [
            dataclasses.replace(
                self,
                encoder_embed_dims=(e_dim,),
                decoder_embed_dims=(d_dim,),
                encoder_depths=(e_depth,),
                decoder_depths=(d_depth,),
                encoder_placement=self.encoder_placement[:e_depth],
                decoder_placement=self.decoder_placement[:d_depth],
            )
            for e_dim, d_dim, e_depth, d_depth in itertools.product(
                self.encoder_embed_dims, self.decoder_embed_dims,
                self.encoder_depths, self.decoder_depths,
            )
        ]  # fmt: skip

    # --- sampling, mutation, crossover -------------------------------------------------------

    def sample(self, rng: Rng) -> Subnet:
        """A subnet with every dimension drawn uniformly."""
        depth = _draw(rng, self.encoder_depths)
        encoder = tuple(self._sample_encoder_layer(rng, i) for i in range(depth))
        decoder = tuple(
            self._sample_decoder_layer(rng, i, depth)
            for i in range(_draw(rng, self.decoder_depths))
        )
        return Subnet(
            Encoder(_draw(rng, self.encoder_embed_dims), encoder),
            Decoder(_draw(rng, self.decoder_embed_dims), decoder),
            self.qkv_dim,
        )

    def mutate(self, subnet: Subnet, rng: Rng, probability: float) -> Subnet:
        """A copy with each dimension drawn anew with the given probability (Algorithm 1).

        Layers and experts that a longer draw adds are drawn anew; the parent is not changed.
        """

        def maybe(value, draw):
            return draw() if rng.random() < probability else value

        e_dim = maybe(subnet.encoder.embed_dim, lambda: _draw(rng, self.encoder_embed_dims))
        e_depth = maybe(len(subnet.encoder.layers), lambda: _draw(rng, self.encoder_depths))
        d_dim = maybe(subnet.decoder.embed_dim, lambda: _draw(rng, self.decoder_embed_dims))
        d_depth = maybe(len(subnet.decoder.layers), lambda: _draw(rng, self.decoder_depths))

        def experts(side: str, i: int, layer) -> tuple[tuple[int, ...], int]:
            count = maybe(len(layer.experts), lambda: _draw(rng, self.experts_choices(side, i)))
            fresh = self._sample_sizes(rng, side, count)
            if self.expert_sizes == "standard":
                kept = layer.experts if count == len(layer.experts) else fresh
                sizes = maybe(kept, lambda: self._sample_sizes(rng, side, count))
            else:
                kept = (*layer.experts, *fresh[len(layer.experts) :])[:count]
                sizes = tuple(maybe(f, lambda: _draw(rng, self.size_choices(side))) for f in kept)
            choices = self.top_k_choices(side, count)
            top_k = maybe(layer.top_k, lambda: _draw(rng, choices))
            return sizes, top_k if top_k in choices else _draw(rng, choices)

        encoder = []
        for i in range(e_depth):
            if i >= len(subnet.encoder.layers):
                encoder.append(self._sample_encoder_layer(rng, i))
                continue
            old = subnet.encoder.layers[i]
            heads = maybe(old.heads, lambda: _draw(rng, self.encoder_heads))
            encoder.append(EncoderLayer(heads, *experts("encoder", i, old)))
        decoder = []
        for i in range(d_depth):
            if i >= len(subnet.decoder.layers):
                decoder.append(self._sample_decoder_layer(rng, i, e_depth))
                continue
            old = subnet.decoder.layers[i]
            self_heads = maybe(old.self_heads, lambda: _draw(rng, self.decoder_self_heads))
            cross_heads = maybe(old.cross_heads, lambda: _draw(rng, self.decoder_cross_heads))
            span = maybe(old.cross_span, lambda: self._draw_span(rng, e_depth))
            if span not in self._spans(e_depth):
                span = self._draw_span(rng, e_depth)
            decoder.append(DecoderLayer(self_heads, cross_heads, span, *experts("decoder", i, old)))
        return Subnet(Encoder(e_dim, tuple(encoder)), Decoder(d_dim, tuple(decoder)), self.qkv_dim)

    def crossover(self, a: Subnet, b: Subnet, rng: Rng) -> Subnet:
        """A child that takes each dimension from one of its parents by a fair coin.

        The experts of a layer (number, sizes, top_k) go together; a layer that only one parent
        has comes from that one.
        """

        def coin(x, y):
            return x if rng.random() < 0.5 else y

        def layers(xs, ys, depth):
            return [
                (xs[i], ys[i]) if i < min(len(xs), len(ys)) else (max((xs, ys), key=len)[i],) * 2
                for i in range(depth)
            ]

        e_depth = coin(len(a.encoder.layers), len(b.encoder.layers))
        d_depth = coin(len(a.decoder.layers), len(b.decoder.layers))
        encoder = []
        for x, y in layers(a.encoder.layers, b.encoder.layers, e_depth):
            moe = coin(x, y)
            encoder.append(EncoderLayer(coin(x.heads, y.heads), moe.experts, moe.top_k))
        decoder = []
        for x, y in layers(a.decoder.layers, b.decoder.layers, d_depth):
            span = coin(x.cross_span, y.cross_span)
            if span not in self._spans(e_depth):
                span = self._draw_span(rng, e_depth)
            moe = coin(x, y)
            decoder.append(
                DecoderLayer(
                    coin(x.self_heads, y.self_heads),
                    coin(x.cross_heads, y.cross_heads),
                    span,
                    moe.experts,
                    moe.top_k,
                )
            )
        return Subnet(
            Encoder(coin(a.encoder.embed_dim, b.encoder.embed_dim), tuple(encoder)),
            Decoder(coin(a.decoder.embed_dim, b.decoder.embed_dim), tuple(decoder)),
            self.qkv_dim,
        )

    def _sample_encoder_layer(self, rng: Rng, i: int) -> EncoderLayer:
        sizes = self._sample_sizes(rng, "encoder", _draw(rng, self.experts_choices("encoder", i)))
        top_k = _draw(rng, self.top_k_choices("encoder", len(sizes)))
        return EncoderLayer(_draw(rng, self.encoder_heads), sizes, top_k)

    def _sample_decoder_layer(self, rng: Rng, i: int, encoder_depth: int) -> DecoderLayer:
        sizes = self._sample_sizes(rng, "decoder", _draw(rng, self.experts_choices("decoder", i)))
        top_k = _draw(rng, self.top_k_choices("decoder", len(sizes)))
        return DecoderLayer(
            _draw(rng, self.decoder_self_heads),
            _draw(rng, self.decoder_cross_heads),
            self._draw_span(rng, encoder_depth),
            sizes,
            top_k,
        )

    def _spans(self, encoder_depth: int) -> tuple[int, ...]:
        return tuple(sorted({min(s, encoder_depth) for s in self.cross_spans}))

    def _draw_span(self, rng: Rng, encoder_depth: int) -> int:
        return min(_draw(rng, self.cross_spans), encoder_depth)

    def _sample_sizes(self, rng: Rng, side: str, n: int) -> tuple[int, ...]:
        if self.expert_sizes == "fractional":
            return tuple(_draw(rng, self.size_choices(side)) for _ in range(n))
        sizes = (_draw(rng, getattr(self, f"{side}_ffn_dims")),) * n
        if self.identity_experts and n > 1 and rng.random() < 0.5:
            sizes = (0, *sizes[1:])
        return sizes

    # --- validation --------------------------------------------------------------------------

    def validate(self, subnet: Subnet):
        """Raises `SubnetError` naming the first field outside the space and what is allowed."""
        _among(subnet.qkv_dim, (self.qkv_dim,), "qkv_dim")
        _among(subnet.encoder.embed_dim, self.encoder_embed_dims, "encoder.embed_dim")
        _among(subnet.decoder.embed_dim, self.decoder_embed_dims, "decoder.embed_dim")
        depth = len(subnet.encoder.layers)
        _among(depth, self.encoder_depths, "the number of encoder.layers")
        _among(len(subnet.decoder.layers), self.decoder_depths, "the number of decoder.layers")
        for i, layer in enumerate(subnet.encoder.layers):
            where = f"encoder.layers[{i}]"
            _among(layer.heads, self.encoder_heads, f"{where}.heads")
            self._validate_experts("encoder", i, layer, where)
        spans = self._spans(depth)
        for i, layer in enumerate(subnet.decoder.layers):
            where = f"decoder.layers[{i}]"
            _among(layer.self_heads, self.decoder_self_heads, f"{where}.self_heads")
            _among(layer.cross_heads, self.decoder_cross_heads, f"{where}.cross_heads")
            _among(layer.cross_span, spans, f"{where}.cross_span")
            self._validate_experts("decoder", i, layer, where)

    def _validate_experts(self, side: str, i: int, layer, where: str):
        n = len(layer.experts)
        _among(n, self.experts_choices(side, i), f"the number of {where}.experts")
        sizes = self.size_choices(side)
        for j, f in enumerate(layer.experts):
            _among(f, sizes, f"{where}.experts[{j}]")
        if self.expert_sizes == "standard":
            first_free = layer.experts[1:] if n > 1 and layer.experts[0] == 0 else layer.experts
            if len(set(first_free)) > 1 or 0 in first_free:
                raise SubnetError(
                    f"{where}.experts is {list(layer.experts)}; the space has standard experts: "
                    "all of one size" + (", the first may be 0" if self.identity_experts else "")
                )
        _among(layer.top_k, self.top_k_choices(side, n), f"{where}.top_k")


def _draw(rng: Rng, choices: Sequence[int]) -> int:
    return int(choices[int(rng.integers(len(choices)))])


def _among(value: int, choices: Sequence[int], where: str):
    if value not in choices:
        allowed = ", ".join(map(str, choices))
        raise SubnetError(f"{where} is {value}; the space allows {allowed}")
