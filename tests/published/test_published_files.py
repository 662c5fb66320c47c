"""HAT's and AutoMoE's YAML, read and written, and the architectures in `configs/subnets`."""

import dataclasses
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from conftest import ROOT, elastic_space

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace, SpaceError
from automoe_jax.architecture.subnet import SubnetError, from_json
from automoe_jax.published import subnet_files, subtransformer, supertransformer

CASES = ["A01_largest", "A02_smallest", "A03_enc32_dec16", "A04_enc16_dec32", "A05_frac",
         "A06_frac_dec2", "A07_identity", "A09_top2", "B01_largest", "B02_smallest",
         "B03_mixed"]  # fmt: skip


def as_published(config: dict) -> str:
    """The file that the published search would write for a fixture's config."""
    lines = []
    for side in ("encoder", "decoder"):
        own = config[side]
        depth = own[f"{side}_layer_num"]
        keys = {
            "embed_dim": "embed-dim-subtransformer",
            "layer_num": "layer-num-subtransformer",
            "ffn_embed_dim": "ffn-embed-dim-all-subtransformer",
            "self_attention_heads": "self-attention-heads-all-subtransformer",
            "ende_attention_heads": "ende-attention-heads-all-subtransformer",
            "arbitrary_ende_attn": "arbitrary-ende-attn-all-subtransformer",
            "n_experts": "n-experts",
            "num_experts_to_route": "num-experts-to-route",
            "std_vs_dummy_experts": "std-vs-dummy-experts",
            "each_expert_ffn_dim": "each-expert-ffn-dim-listoflist",
        }
        for ours, theirs in keys.items():
            if f"{side}_{ours}" in own:
                value = own[f"{side}_{ours}"]
                if isinstance(value, list):
                    value = value[:depth]
                    if ours == "each_expert_ffn_dim":
                        value = ["_".join(map(str, sizes)) for sizes in value]
                lines.append(f"{side}-{theirs}: {value}")
    return "\n".join(lines)


@pytest.mark.parametrize("case", CASES)
def test_fixture_architectures(shared, case):
    info = json.loads((shared / f"fixtures/{case}.json").read_text())
    subnet = from_json(info["subnet"], 32)
    text = as_published(info["config"])
    assert subtransformer.parse(text, 32) == subnet
    # Our file has their values, except for unused sizes; a subnet without experts is written in
    # HAT's form.
    written, theirs = yaml.safe_load(subtransformer.dump(subnet)), yaml.safe_load(text)
    dense = all(len(x.experts) == 1 for x in (*subnet.encoder.layers, *subnet.decoder.layers))
    for key, value in theirs.items():
        if "experts-to-route" in key:  # ours are cut to the experts of the layer
            counts = theirs[key.replace("num-experts-to-route", "n-experts")]
            cut = [min(pair) for pair in zip(value, counts, strict=True)]
            assert written.get(key, cut) == cut
        elif "ffn-embed-dim-all" not in key and not (dense and "experts" in key):
            assert written[key] == value, key
    assert set(written) - set(theirs) == {"qkv-dim"}


def test_train6_architectures(shared):
    steps = json.loads((shared / "fixtures/train6_zero_fill.json").read_text())["steps"]
    for step in steps:
        text = as_published(step["config"])
        assert subtransformer.parse(text, 32) == from_json(step["subnet"], 32)


def test_published_hat_subnets_go_through_yaml(shared):
    models = json.loads((shared / "published/hat_wmt14_ende.json").read_text())["models"]
    for name, model in models.items():
        subnet = from_json(model["subnet"], model["qkv_dim"])
        text = subtransformer.dump(subnet)
        assert "experts" not in text, name
        assert "qkv-dim" not in text, name
        assert subtransformer.parse(text) == subnet, name


def writable(subnet) -> bool:
    layers = (*subnet.encoder.layers, *subnet.decoder.layers)
    return all(0 not in layer.experts[1:] for layer in layers)


@hypothesis.given(st.integers(0, 2**32))
def test_subtransformer_round_trip(seed):
    space = elastic_space(qkv_dim=32)
    rng = np.random.default_rng(seed)
    subnet = next(s for s in (space.sample(rng) for _ in itertools.count()) if writable(s))
    assert subtransformer.parse(subtransformer.dump(subnet)) == subnet


def test_identity_elsewhere_is_not_written(tmp_path):
    space = elastic_space()
    layers = space.largest().encoder.layers
    layers = (dataclasses.replace(layers[0], experts=(8, 0)), *layers[1:])
    encoder = dataclasses.replace(space.largest().encoder, layers=layers)
    subnet = dataclasses.replace(space.largest(), encoder=encoder)
    with pytest.raises(SubnetError, match=r"encoder.layers\[0\].experts is \[8, 0\]"):
        subnet_files.save(subnet, tmp_path / "x.yml")
    assert not (tmp_path / "x.yml").exists()
    subnet_files.save(subnet, tmp_path / "x.json")
    assert subnet_files.load(tmp_path / "x.json") == subnet


MOE = """
encoder-embed-dim-subtransformer: 512
decoder-embed-dim-subtransformer: 640
encoder-ffn-embed-dim-all-subtransformer: [3072, 2048]
decoder-ffn-embed-dim-all-subtransformer: [1024, 2048]
encoder-layer-num-subtransformer: 2
decoder-layer-num-subtransformer: 1
encoder-self-attention-heads-all-subtransformer: [8, 4]
decoder-self-attention-heads-all-subtransformer: [4]
decoder-ende-attention-heads-all-subtransformer: [8]
decoder-arbitrary-ende-attn-all-subtransformer: [1]
encoder-n-experts: [3, 2]
encoder-num-experts-to-route: [2, 3]
encoder-std-vs-dummy-experts: [0, 1]
encoder-each-expert-ffn-dim-listoflist: ['1024_2048_3072', '2048_1024']
label-smoothing: 0.1
qkv-dim: 256
"""


def test_experts_of_a_subtransformer_file():
    subnet = subtransformer.parse(MOE)
    assert subnet.qkv_dim == 256
    assert [x.experts for x in subnet.encoder.layers] == [(0, 2048, 3072), (2048, 1024)]
    assert [x.top_k for x in subnet.encoder.layers] == [2, 2]  # at most the experts of the layer
    assert [x.experts for x in subnet.decoder.layers] == [(1024,)]
    # YAML reads sizes without quotes, as in the published files, as one number; we do not.
    assert subtransformer.parse(MOE.replace("'", "")) == subnet
    assert subtransformer.parse(MOE.replace("'1024_2048_3072'", "\"'1024_2048_3072'\"")) == subnet


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[3, 2]", "[3]", "encoder-n-experts is [3]; it must list at least 2"),
        ("[3, 2]", "[4, 2]", "listoflist has 3 size(s) for 4 experts"),
        ("[3, 2]", "[0, 2]", "encoder-n-experts has 0 for layer 0"),
        ("[0, 1]", "[2, 1]", "encoder-std-vs-dummy-experts has 2"),
        ("'2048_1024'", "'2048-1024'", "listoflist has '2048-1024'"),
        ("encoder-n-experts: [3, 2]", "", "needs encoder-n-experts"),
        ("[1]\n", "[-1, x]\n", "decoder-arbitrary-ende-attn-all-subtransformer has -2"),
        ("label-smoothing", "label-smoothness", "label-smoothness is not a key"),
        ("label-smoothing: 0.1", "encoder-normalize-before: True", "no such architecture"),
        ("label-smoothing: 0.1", "encoder-expert-type: thor", "no such architecture"),
        ("label-smoothing: 0.1", "encoder-is-scale-prob: False", "no such architecture"),
        ("label-smoothing: 0.1", "qkv-dim: 512", "qkv-dim is given twice"),
        ("num-subtransformer: 1\n", "num-subtransformer: 99999\n", "positive integer up to 1000"),
        ("label-smoothing", "encoder-embed-choice", "give it as --config=configs/supertr"),
        ("encoder-n-experts", "encoder-n-expert", "did you mean encoder-n-experts?"),
        ("label-smoothing: 0.1", "encoder-drop-ffn-sublayer: [1, 0]", "drops a sublayer"),
        ("label-smoothing: 0.1", "decoder-std-vs-dummy-experts: [0]", "needs decoder-n-experts"),
        (
            "label-smoothing: 0.1",
            "decoder-n-experts: [1]\ndecoder-std-vs-dummy-experts: [0]",
            "does not read a list of one entry",
        ),
    ],
)
def test_wrong_subtransformer_files(old, new, words):
    text = MOE.replace(old, new.replace("x]", "-2]")).replace("[-1, -2]", "[-2]")
    with pytest.raises(SubnetError) as e:
        subtransformer.parse(text)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


# The paper's Table 2 without experts, as HAT writes it for WMT.
HAT_SPACE = """
share-all-embeddings: True
max-tokens: 4096
adam-betas: (0.9, 0.98)
encoder-embed-dim: 640
decoder-embed-dim: 640
encoder-ffn-embed-dim: 3072
decoder-ffn-embed-dim: 3072
encoder-layers: 6
decoder-layers: 6
encoder-attention-heads: 8
qkv-dim: 512
encoder-embed-choice: [640, 512]
decoder-embed-choice: [640, 512]
encoder-ffn-embed-dim-choice: [3072, 2048, 1024]
decoder-ffn-embed-dim-choice: [3072, 2048, 1024]
encoder-layer-num-choice: [6]
decoder-layer-num-choice: [6, 5, 4, 3, 2, 1]
encoder-self-attention-heads-choice: [8, 4]
decoder-self-attention-heads-choice: [8, 4]
decoder-ende-attention-heads-choice: [8, 4]
decoder-arbitrary-ende-attn-choice: [-1, 1, 2]
"""


def test_supertransformer_files():
    dense = SearchSpace(encoder_experts=(1,), decoder_experts=(1,))
    assert supertransformer.parse(HAT_SPACE) == dense
    apart = supertransformer.parse(HAT_SPACE.replace("share-all-embeddings: True", ""))
    assert apart == dataclasses.replace(dense, share_embeddings="none")
    experts = """
encoder-n-experts: [1, 2, 3, 4, 5, 6]
decoder-n-experts: [1, 2, 3, 4, 5, 6]
encoder-each-expert-ffn-dim: [0, 1]
decoder-each-expert-ffn-dim: [0, 1]
"""
    assert supertransformer.parse(HAT_SPACE + experts) == SearchSpace()
    standard = supertransformer.parse(HAT_SPACE + experts.replace("[0, 1]", "[1]"))
    assert standard == SearchSpace(expert_sizes="standard")
    one_side = supertransformer.parse(HAT_SPACE + "decoder-n-experts: [1, 2]\n")
    assert one_side == SearchSpace(
        encoder_experts=(1,), decoder_experts=(1, 2), expert_sizes="standard"
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("encoder-embed-dim: 640", "encoder-embed-dim: 768", "encoder-embed-dim is 768"),
        ("[-1, 1, 2]", "[-1, 3]", "decoder-arbitrary-ende-attn-choice has 3"),
        ("encoder-layer-num-choice: [6]", "", "encoder-layer-num-choice is missing"),
        ("max-tokens", "most-tokens", "most-tokens is not a key"),
        ("qkv-dim: 512", "qkv-dim: many", "qkv-dim has 'many'"),
        ("choice: [640, 512]", "choice: []", "encoder-embed-choice is an empty list"),
        ("choice: [640, 512]", "choice: [-640, 512]", "encoder-embed-choice has -640"),
        ("max-tokens", "encoder-layer-num-subtransformer", "give it as --subnet"),
        (
            "max-tokens: 4096",
            "encoder-n-experts: [2]\nencoder-std-vs-dummy-experts: [2]",
            "encoder-std-vs-dummy-experts is [2]; allowed: 0 and 1",
        ),
        (
            "max-tokens: 4096",
            "encoder-n-experts: [2]\ndecoder-n-experts: [2]\nencoder-each-expert-ffn-dim: [0, 1]",
            "encoder-each-expert-ffn-dim and decoder-each-expert-ffn-dim differ",
        ),
    ],
)
def test_wrong_supertransformer_files(old, new, words):
    with pytest.raises(SpaceError) as e:
        supertransformer.parse(HAT_SPACE.replace(old, new))
    assert words in str(e.value)


@hypothesis.given(st.data())
def test_supertransformer_round_trip(data):
    def choices(*values):
        return tuple(sorted(data.draw(st.sets(st.sampled_from(values), min_size=1))))

    depths = choices(3, 4)
    space = SearchSpace(
        qkv_dim=data.draw(st.sampled_from([64, 512])),
        encoder_embed_dims=choices(32, 48, 64),
        decoder_embed_dims=choices(32, 64),
        encoder_depths=depths,
        decoder_depths=choices(1, 2, 6),
        encoder_heads=choices(2, 4),
        decoder_self_heads=choices(1, 8),
        decoder_cross_heads=choices(2, 8),
        cross_spans=choices(1, 2, 3),
        encoder_experts=choices(1, 2, 5),
        decoder_experts=choices(2, 3),
        encoder_placement=data.draw(st.sampled_from([(), (1, 3, 2, 4)[: max(depths)]])),
        encoder_ffn_dims=choices(16, 24),
        decoder_ffn_dims=choices(16, 32, 64),
        expert_sizes=data.draw(st.sampled_from(["fractional", "standard"])),
        identity_experts=data.draw(st.booleans()),
        encoder_top_k=choices(1, 2),
        decoder_top_k=choices(1, 2),
        share_embeddings=data.draw(st.sampled_from(["all", "decoder", "none"])),
    )
    assert supertransformer.parse(supertransformer.dump(space)) == space


# Experts per layer as the papers print them, and active parameters in millions: the paper has 176 M
# for the Big models, 45 M and 46 M for its standard subnets, 56 M and 46 M in Table 1. It gives no
# embedding width for the fractional ones, so their figures cannot be compared.
SHIPPED = {
    "transformer_base": ("1-1-1-1-1-1 / 1-1-1-1-1-1", 44.14),
    "transformer_big": ("1-1-1-1-1-1 / 1-1-1-1-1-1", 176.36),
    "transformer_small": ("1-1-1-1-1-1 / 1-1-1-1-1-1", 31.54),
    "transformer_deep_1": ("1-1-1-1-1-1-1-1-1-1-1-1 / 1", 42.03),
    "transformer_deep_2": ("1-1-1-1-1-1-1-1-1-1-1-1 / 1-1", 46.24),
    "switch_big_every_layer": ("2-2-2-2-2-2 / 2-2-2-2-2-2", 176.38),
    "switch_big_every_other_layer": ("1-3-1-3-1-3 / 1-3-1-3-1-3", 176.38),
    "manual_every_layer": ("4-4-4-4-4-4 / 4-4-4-4-4-4", 56.76),
    "manual_every_other_layer": ("1-4-1-4-1-4 / 1-4-1-4-1-4", 56.75),
    "automoe_4_experts": ("1-1-4-4-4-1 / 4-1-1-1", 46.23),
    "wmt14_ende_standard": ("5-1-1-1-2-1 / 1-1-1-1", 45.18),
    "wmt14_enfr_standard": ("1-4-2-6-5-5 / 2-1-1-3", 46.24),
    "wmt19_ende_standard": ("1-1-2-1-2-1 / 1-1-1-2", 45.18),
    "wmt14_ende_fractional": ("3-2-3-4-1-3 / 3-1-1-1", None),
    "wmt14_enfr_fractional": ("6-2-3-4-4-5 / 2-1-4-2", None),
    "wmt19_ende_fractional": ("2-3-1-2-6-1 / 2-4-1-1", None),
    # 64.1 and 221.7 with the embeddings (So et al. 2019): see test_evolved.py.
    "evolved_base": ("1-1-1 / 1-1-1-1", 47.04),
    "evolved_big": ("1-1-1 / 1-1-1-1", 187.67),
}


def active_by_hand(subnet) -> float:
    """Active parameters under uniform routing, summed from the shapes of each layer's matrices."""
    q, total = subnet.qkv_dim, 0.0
    for stack, n_attentions in ((subnet.encoder, 1), (subnet.decoder, 2)):
        d = stack.embed_dim
        assert d == subnet.encoder.embed_dim  # keys and values have one width everywhere
        for layer in stack.layers:
            attention = 3 * (d * q + q) + q * d + d
            total += n_attentions * (attention + 2 * d) + 2 * d
            n = len(layer.experts)
            total += sum(d * f + f + f * d + d for f in layer.experts) / n
            total += (d * n + n) * (n > 1)
    return total


def test_shipped_architectures():
    found = {path.stem: subnet_files.load(path) for path in (ROOT / "configs/subnets").iterdir()}
    assert found.keys() == SHIPPED.keys()
    page = (ROOT / "docs/published.md").read_text(encoding="utf-8")
    for name, subnet in found.items():
        experts, active = SHIPPED[name]
        counted = " / ".join(
            "-".join(str(len(layer.experts)) for layer in stack.layers)
            for stack in (subnet.encoder, subnet.decoder)
        )
        assert counted == experts, name
        counts = complexity.count(subnet)
        if subnet.cell == "transformer":
            assert counts.active_params == pytest.approx(active_by_hand(subnet), rel=1e-12)
        if active is not None:
            assert round(counts.active_params / 1e6, 2) == active, name
        assert counts.active_params_min <= counts.active_params <= counts.active_params_max
        row = (
            f"| `{name}` | {experts} | {counts.params / 1e6:.2f} | "
            f"{counts.active_params / 1e6:.2f} | {counts.sparsity:.1%} | {counts.flops / 1e9:.3f} |"
        )
        assert row in page, row
    for name in ("switch_big_every_layer", "switch_big_every_other_layer"):
        assert round(100 * complexity.count(found[name]).sparsity) == 36
    # Table 4's row of WMT'19, whose supernet has 2 experts in every layer.
    wmt19 = complexity.count(found["wmt19_ende_standard"])
    assert round(100 * wmt19.sparsity_supernet) == 41
    for name, subnet in found.items():
        if name.startswith("wmt"):
            space = SearchSpace(expert_sizes=name.split("_")[-1])
            space.validate(subnet)


def test_size_of_a_space():
    space = elastic_space(
        encoder_depths=(1, 2),
        decoder_depths=(1,),
        encoder_experts=(1, 2),
        decoder_experts=(1,),
        encoder_ffn_dims=(8,),
        decoder_ffn_dims=(8, 16),
        identity_experts=True,
        decoder_embed_dims=(8,),
    )
    rng = np.random.default_rng(0)
    # Counted by hand: 2 widths; an encoder layer has 2 choices of heads and [8], [0] or one of four
    # pairs with top_k 1 or 2; a decoder layer has 2 x 3 choices of heads, 3 sizes, 1 or 2 spans.
    layer = 2 * (2 + 4 * 2)
    assert space.size() == 2 * (layer * 6 * 3 * 1 + layer**2 * 6 * 3 * 2)
    small = dataclasses.replace(space, encoder_depths=(1,), identity_experts=False)
    assert len({small.sample(rng) for _ in range(3000)}) == small.size()
