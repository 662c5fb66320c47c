"""Which tokens go to which expert."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import VOCAB, elastic_space, random_params, standalone_of

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.data.tokens import Side, TokenPairs
from automoe_jax.model.experts import Routing, rerouted
from automoe_jax.model.extract import extract
from automoe_jax.training.config import ModelConfig, TrainingConfig
from automoe_jax.training.routing import LayerRouting, ffn_flops, losses_by_routing, routing_of
from automoe_jax.training.target import TrainingTarget

ROUTING = LayerRouting(
    "encoder", 1, (8, 16, 8), ids_N=np.array([4, 5, 6, 7]), expert_N=np.array([0, 1, 1, 2]),
    entropy=0.5,
)  # fmt: skip


def test_shares_by_hand():
    np.testing.assert_allclose(ROUTING.load_E, [0.25, 0.5, 0.25])
    assert ROUTING.share_by_size == {8: 0.5, 16: 0.5}
    share_EC = ROUTING.share_EC(np.array([0, 0, 1, -1]), 3)
    np.testing.assert_allclose(share_EC, [[0.5, 0, 0], [0.5, 1, 0], [0, 0, 0]])


def test_flops_of_tokens_by_hand():
    other = dataclasses.replace(ROUTING, number=2, sizes=(4,), expert_N=np.zeros(4, int))
    found = ffn_flops([ROUTING, other], width=10)
    assert found.tolist() == [40 * 12, 40 * 20, 40 * 20, 40 * 12]


def test_routing_is_that_of_the_model():
    """Sentence by sentence, without batches: the same tokens, experts and entropy."""
    space = elastic_space(
        encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,), encoder_top_k=(1,),
    )  # fmt: skip
    subnet, rng = space.largest(), np.random.default_rng(0)
    params = extract(random_params(space), subnet, space.hull())
    lengths = [3, 7, 5, 2]
    sentences = [np.append(rng.integers(4, VOCAB, n), EOS_ID).astype(np.uint16) for n in lengths]
    starts = np.cumsum([0, *map(len, sentences)])
    side = Side(np.concatenate(sentences), starts)
    pairs = TokenPairs(side, side, {})
    target = TrainingTarget(space, (VOCAB, VOCAB), ModelConfig(), subnet)
    config = TrainingConfig(tokens_per_batch=32)
    encoder, decoder = routing_of(target, params, pairs, config)
    model = jax.jit(standalone_of(space, subnet).apply)
    experts, entropy, ids = ([], []), ([], []), ([], [])
    for sentence in sentences:
        padded = np.full((1, 10), PAD_ID, np.int32)
        padded[0, : len(sentence)] = sentence
        read = np.full((1, 10), PAD_ID, np.int32)
        read[0, : len(sentence)] = [EOS_ID, *sentence[:-1]]
        logits = model({"params": params}, padded, read).router_logits
        for k, own in enumerate((padded, read)):
            p = np.asarray(jax.nn.softmax(logits[k]), np.float64)[: len(sentence)]
            experts[k].extend(p.argmax(axis=-1))
            entropy[k].extend(-(p * np.log(p)).sum(axis=-1))
            ids[k].extend(own[0, : len(sentence)])
    for k, found in enumerate((encoder, decoder)):
        # The batches may have the sentences in another order.
        assert sorted(zip(found.ids_N, found.expert_N, strict=True)) == sorted(
            zip(ids[k], experts[k], strict=True)
        )
        assert found.entropy == pytest.approx(np.mean(entropy[k]), rel=1e-4)


def test_other_experts_for_the_same_gates():
    expert_NK = np.array([[0], [2], [1], [3]])  # the last is padding
    gate_NK = np.array([[0.5], [0.6], [0.7], [0.8]])
    routing = Routing(np.zeros((4, 3)), expert_NK, gate_NK)
    largest = rerouted(routing, (8, 16, 8), "largest", 0)
    assert np.asarray(largest.expert_NK).ravel().tolist() == [1, 1, 1, 3]
    assert largest.gate_NK is gate_NK
    random = np.asarray(rerouted(routing, (8, 16, 8), "random", 0).expert_NK)
    assert random[3] == 3
    many = Routing(np.zeros((3000, 3)), np.zeros((3000, 1), int), np.ones((3000, 1)))
    counts = np.bincount(np.asarray(rerouted(many, (8, 8, 8), "random", 1).expert_NK).ravel())
    np.testing.assert_allclose(counts, 1000, atol=100)


def test_what_the_choice_of_experts_is_worth():
    """Nothing, where all experts of a layer are one."""
    space = elastic_space(
        encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,), encoder_top_k=(1,),
        decoder_top_k=(1,), encoder_experts=(2,), decoder_experts=(2,), encoder_ffn_dims=(8,),
        decoder_ffn_dims=(8,),
    )  # fmt: skip
    subnet = space.largest()
    params = extract(random_params(space), subnet, space.hull())
    ids = np.random.default_rng(0).integers(4, VOCAB, 60).astype(np.uint16)
    ids[9::10] = EOS_ID
    side = Side(ids, np.arange(0, 61, 10))
    target = TrainingTarget(space, (VOCAB, VOCAB), ModelConfig(), subnet)
    inputs = TokenPairs(side, side, {}), TrainingConfig(tokens_per_batch=40)
    found = losses_by_routing(target, params, *inputs)
    assert len(set(found.values())) == 3
    for stack in (params["encoder"], params["decoder"]):
        experts = stack["layer_0"]["experts"]
        for name in ("fc1", "fc1_bias", "fc2"):
            first = experts[name][:8]
            experts[name] = np.concatenate([first, first])
        experts["fc2_bias"] = np.repeat(experts["fc2_bias"][:1], 2, axis=0)
    alike = losses_by_routing(target, params, *inputs)
    assert alike["random"] == pytest.approx(alike["learned"], rel=1e-6)
    assert alike["largest"] == pytest.approx(alike["learned"], rel=1e-6)
