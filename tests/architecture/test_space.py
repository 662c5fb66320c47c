"""Search spaces: drawn subnets are valid, whatever the options."""

import dataclasses
import hashlib
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import elastic_space

from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.counts import count
from automoe_jax.architecture.space import SearchSpace, SpaceError
from automoe_jax.architecture.subnet import EncoderLayer, SubnetError, to_json

OPTIONS = {
    "paper": SearchSpace(),
    "everything elastic": elastic_space(),
    "standard experts": elastic_space(expert_sizes="standard"),
    "standard without identity": elastic_space(expert_sizes="standard", identity_experts=False),
    "fixed placement": elastic_space(encoder_placement=(1, 2, 1), decoder_placement=(2, 1, 3)),
    "dense": elastic_space(encoder_experts=(1,), decoder_experts=(1,), identity_experts=False),
    "top 2 only": elastic_space(encoder_top_k=(2,), decoder_top_k=(2,)),
    "spans with a gap": elastic_space(cross_spans=(1, 3), encoder_depths=(2, 3)),
    "fractional without identity": elastic_space(identity_experts=False),
    "wide spans, short encoder": elastic_space(cross_spans=(3,), encoder_depths=(3,)),
}
seeds = st.integers(0, 2**32)
spaces = st.sampled_from(sorted(OPTIONS))


@hypothesis.given(spaces, seeds)
def test_drawn_subnets_are_valid(name, seed):
    space, rng = OPTIONS[name], np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    before = (a, b)
    child = space.crossover(a, b, rng)
    mutant = space.mutate(a, rng, 0.3)
    for subnet in (a, b, child, mutant, space.largest(), space.smallest()):
        space.validate(subnet)
        assert dataclasses.replace(subnet) == subnet  # passes the checks of `Subnet`
        to_active(subnet, space.hull())
    assert (a, b) == before


@hypothesis.given(spaces, seeds)
def test_nothing_is_cheaper_than_the_smallest(name, seed):
    space = OPTIONS[name]
    subnet = space.sample(np.random.default_rng(seed))
    assert count(space.smallest()).flops <= count(subnet).flops <= count(space.largest()).flops


@hypothesis.given(spaces, seeds)
def test_mutation_probability(name, seed):
    space, rng = OPTIONS[name], np.random.default_rng(seed)
    a = space.sample(rng)
    assert space.mutate(a, rng, 0.0) == a
    different = [space.mutate(a, rng, 1.0) for _ in range(20)]
    assert any(m != a for m in different)


@hypothesis.given(seeds)
def test_crossover_takes_from_parents(seed):
    space, rng = OPTIONS["everything elastic"], np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    child = space.crossover(a, b, rng)
    assert child.encoder.embed_dim in (a.encoder.embed_dim, b.encoder.embed_dim)
    for i, layer in enumerate(child.encoder.layers):
        parents = [p.encoder.layers[i] for p in (a, b) if i < len(p.encoder.layers)]
        assert layer.heads in [p.heads for p in parents]
        assert layer.experts in [p.experts for p in parents]


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_shapes_partition_the_space(name):
    space, rng = OPTIONS[name], np.random.default_rng(0)
    shapes = space.shapes()
    assert sum(shape.size() for shape in shapes) == space.size()
    for shape in shapes:
        subnet = shape.sample(rng)
        space.validate(subnet)
        others = [x for x in shapes if x != shape]
        assert len(others) == len(shapes) - 1
        for other in others:
            with pytest.raises(SubnetError):
                other.validate(subnet)


def test_every_choice_is_drawn():
    space, rng = SearchSpace(), np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(300)]
    assert {s.encoder.embed_dim for s in drawn} == {512, 640}
    assert {len(s.decoder.layers) for s in drawn} == {1, 2, 3, 4, 5, 6}
    assert {len(s.encoder.layers) for s in drawn} == {6}
    layers = [x for s in drawn for x in s.decoder.layers]
    assert {x.cross_span for x in layers} == {1, 2, 3}
    assert {len(x.experts) for x in layers} == {1, 2, 3, 4, 5, 6}
    assert {f for x in layers for f in x.experts} == {1024, 2048, 3072}
    assert {x.self_heads for x in layers} == {4, 8}


def test_sampling_is_seeded():
    space = SearchSpace()
    a, b = (space.sample(np.random.default_rng(7)) for _ in range(2))
    assert a == b


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("paper", "ae7500a6379c"),
        ("everything elastic", "2ac8bc24fcf1"),
        ("standard experts", "c1c128f6bc18"),
    ],
)
def test_random_draws_are_as_they_were(name, digest):
    """Fixed draws of a fixed seed: a search with the same seed repeats across versions.

    Where the order of draws changes on purpose, put the new digests here and say in the commit that
    searches of earlier versions can no longer be repeated.
    """
    space, rng = OPTIONS[name], np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(20)]
    drawn += [space.mutate(subnet, rng, p) for subnet in drawn for p in (0.1, 0.3, 0.9)]
    drawn += [space.crossover(a, b, rng) for a, b in itertools.pairwise(drawn)]
    text = json.dumps([to_json(subnet) for subnet in drawn])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest


def test_hull_heads_are_the_finest_split():
    space = elastic_space(qkv_dim=24, encoder_heads=(2, 3), decoder_self_heads=(4, 6))
    assert space.hull().encoder.layers[0].heads == 6
    assert space.hull().decoder.layers[0].self_heads == 12
    assert space.largest().encoder.layers[0].heads == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_depths": ()}, "space.encoder_depths is empty"),
        ({"encoder_ffn_dims": (8, -1)}, "space.encoder_ffn_dims has -1"),
        ({"encoder_heads": (3,)}, "space.encoder_heads is (3,)"),
        ({"expert_sizes": "equal"}, "space.expert_sizes is 'equal'"),
        ({"encoder_placement": (1, 2)}, "space.encoder_placement has 2 entries"),
        ({"cross_spans": (2,), "encoder_depths": (1, 2)}, "space.cross_spans starts at 2"),
    ],
)
def test_wrong_space(changes, words):
    with pytest.raises(SpaceError) as e:
        elastic_space(**changes)
    assert words in str(e.value)


def test_outside_the_space_is_named():
    space = OPTIONS["standard without identity"]
    good = space.largest()

    def with_layer(layer):
        stack = dataclasses.replace(good.encoder, layers=(layer, *good.encoder.layers[1:]))
        return dataclasses.replace(good, encoder=stack)

    for layer, words in (
        (EncoderLayer(1, (8,)), "encoder.layers[0].heads is 1; the space allows 2, 4"),
        (EncoderLayer(2, (9,)), "encoder.layers[0].experts[0] is 9; the space allows 8, 16, 20"),
        (EncoderLayer(2, (8, 16)), "all of one size"),
        (EncoderLayer(2, (8,) * 4), "the number of encoder.layers[0].experts is 4"),
    ):
        with pytest.raises(SubnetError) as e:
            space.validate(with_layer(layer))
        assert words in str(e.value)
