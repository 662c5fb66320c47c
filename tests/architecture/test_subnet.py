"""Subnets as JSON and as HAT's YAML; an error is one line that names the field."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import elastic_space

from automoe_jax.architecture.subnet import SubnetError, from_json, short_name, to_json
from automoe_jax.published import subnet_files
from automoe_jax.system.errors import UserError

GOOD = {
    "version": 1,
    "qkv_dim": 512,
    "encoder": {
        "embed_dim": 640,
        "layers": [
            {"heads": 8, "experts": [2048, 3072, 2048]},
            {"heads": 4, "experts": [3072, 0], "top_k": 2},
        ],
    },
    "decoder": {
        "embed_dim": 512,
        "layers": [{"self_heads": 8, "cross_heads": 8, "cross_span": 1, "experts": [3072, 1024]}],
    },
}

HAT = """
encoder-embed-dim-subtransformer: 640
decoder-embed-dim-subtransformer: 512
encoder-ffn-embed-dim-all-subtransformer: [3072, 2048, 1024, 1024, 1024, 1024]
decoder-ffn-embed-dim-all-subtransformer: [1024, 3072, 2048]
encoder-layer-num-subtransformer: 6
decoder-layer-num-subtransformer: 2
encoder-self-attention-heads-all-subtransformer: [4, 8, 8, 8, 8, 8]
decoder-self-attention-heads-all-subtransformer: [8, 4, 8]
decoder-ende-attention-heads-all-subtransformer: [4, 8, 8]
# -1 is the last layer, 1 the last two, 2 the last three
decoder-arbitrary-ende-attn-all-subtransformer: [-1, 2, 1]
"""


def changed(path: tuple, value) -> dict:
    obj = json.loads(json.dumps(GOOD))
    at = obj
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return obj


@hypothesis.given(st.integers(0, 2**32))
def test_json_round_trip(seed):
    subnet = elastic_space().sample(np.random.default_rng(seed))
    assert from_json(json.loads(json.dumps(to_json(subnet)))) == subnet


def test_json_is_the_documented_form(tmp_path):
    subnet = from_json(GOOD)
    assert to_json(subnet) == GOOD
    assert subnet.encoder.layers[0].top_k == 1
    assert short_name(subnet) == "E640 3-2 D512 2"
    subnet_files.save(subnet, tmp_path / "a" / "x.json")
    assert subnet_files.load(tmp_path / "a" / "x.json") == subnet


def test_qkv_dim_may_be_left_out():
    assert from_json(changed(("qkv_dim",), None)).qkv_dim == 512


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("encoder",), None, "encoder is missing"),
        (("encoder", "layers"), [], "encoder.layers is empty"),
        (("encoder", "layers", 1, "heads"), 3, "encoder.layers[1].heads is 3"),
        (("encoder", "layers", 1, "heads"), True, "encoder.layers[1].heads is True"),
        (("encoder", "layers", 0, "experts"), [], "encoder.layers[0].experts is empty"),
        (("encoder", "layers", 0, "experts"), 512, "encoder.layers[0].experts is 512"),
        (("encoder", "layers", 0, "experts"), [5, -1], "encoder.layers[0].experts[1] is -1"),
        (("encoder", "layers", 1, "top_k"), 3, "encoder.layers[1].top_k is 3"),
        (("encoder", "layers", 1, "top"), 3, "encoder.layers[1].top is not a field"),
        (("decoder", "layers", 0, "cross_span"), 3, "decoder.layers[0].cross_span is 3"),
        (("decoder", "layers", 0, "self_heads"), None, "decoder.layers[0].self_heads is missing"),
        (("decoder", "embed_dim"), "512", "decoder.embed_dim is '512'"),
        (("version",), 2, "version is 2"),
    ],
)
def test_wrong_field_is_named(path, value, words):
    with pytest.raises(SubnetError, match=r".") as e:
        from_json(changed(path, value))
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_wrong_files(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match="does not exist"):
        subnet_files.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        subnet_files.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        subnet_files.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        subnet_files.load(path)


def test_hat_yaml(tmp_path):
    path = tmp_path / "hat.yml"
    path.write_text(HAT)
    subnet = subnet_files.load(path)
    assert (subnet.encoder.embed_dim, subnet.decoder.embed_dim) == (640, 512)
    assert [x.heads for x in subnet.encoder.layers] == [4, 8, 8, 8, 8, 8]
    assert [x.experts for x in subnet.encoder.layers[:3]] == [(3072,), (2048,), (1024,)]
    # Lists may be longer than the number of layers; the front entries count.
    assert [
        (x.self_heads, x.cross_heads, x.cross_span, x.experts) for x in subnet.decoder.layers
    ] == [
        (8, 4, 1, (1024,)),
        (4, 8, 3, (3072,)),
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[-1, 2, 1]", "[-1, 3, 1]", "decoder-arbitrary-ende-attn-all-subtransformer has 3"),
        (
            "decoder-layer-num-subtransformer: 2",
            "decoder-layer-num-subtransformer: 9",
            "at least 9",
        ),
        (
            "encoder-embed-dim-subtransformer: 640",
            "",
            "encoder-embed-dim-subtransformer is missing",
        ),
        ("decoder-embed-dim-subtransformer", "decoder-width", "decoder-width is not a key"),
        ("640", "[640", "not YAML"),
    ],
)
def test_wrong_hat_yaml(tmp_path, old, new, words):
    path = tmp_path / "hat.yml"
    path.write_text(HAT.replace(old, new, 1))
    with pytest.raises(SubnetError) as e:
        subnet_files.load(path)
    assert words in str(e.value)
    assert "\n" not in str(e.value)
