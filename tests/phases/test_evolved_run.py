"""An Evolved Transformer's whole way: trained, taught, exported, translated with."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Encoder
from automoe_jax.decoding.export import export as write_export
from automoe_jax.decoding.translator import Translator
from automoe_jax.phases import first_weights, teachers
from automoe_jax.phases.export import export_params, model_spec
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import SUBNET
from automoe_jax.phases.train import train_subnet, train_supernet
from automoe_jax.phases.weights import subnet_params
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training import parallel
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.target import TrainingTarget

SPACE = SearchSpace(
    qkv_dim=8, encoder_embed_dims=(8,), decoder_embed_dims=(12,), encoder_depths=(1,),
    decoder_depths=(1,), encoder_heads=(2,), decoder_self_heads=(2,), decoder_cross_heads=(2,),
    cross_spans=(1,), encoder_experts=(1,), decoder_experts=(1,), encoder_ffn_dims=(16,),
    decoder_ffn_dims=(16,), cell="evolved",
)  # fmt: skip


@pytest.mark.slow
def test_trains_teaches_and_translates(prepared, tmp_path):
    run, data, *_ = prepared
    training = dataclasses.replace(run.config.subnet_training, steps=30, warmup_steps=5)
    config = dataclasses.replace(run.config, space=SPACE, subnet_training=training)
    run = dataclasses.replace(run, path=tmp_path / "run", config=config)
    with pytest.raises(UserError, match="have no supernet"):
        train_supernet(run)
    train_subnet(run, SPACE.largest())
    params, subnet, step = subnet_params(run)
    assert (subnet, step) == (SPACE.largest(), 30)
    lines = [json.loads(x) for x in (run.path / SUBNET / "metrics.jsonl").open()]
    losses = [x["value"] for x in lines if x["name"] == "train/loss"]
    assert losses[-1] < losses[0] - 0.1

    export = tmp_path / "export"
    export_params(run, params, subnet, export, "test")
    assert json.loads((export / "manifest.json").read_text())["kernels"] == ["xla"]
    translator = Translator.load(export)
    (found,) = translator.translate(["one"], max_length=8)
    assert np.isfinite(found.score)
    with pytest.raises(UserError, match="native kernels cannot be used: they have no convolutions"):
        Translator.load(export, kernels="native")

    # Its export predicts as the trained weights do, and teaches another.
    own = TrainingTarget(SPACE, data.tokenizer.vocab_sizes, config.model, subnet)
    teacher = teachers.load(export, data.tokenizer, Silent())
    scorer = Evaluator(own, data.valid, config.subnet_training, 0)
    both = [scorer.loss(parallel.replicate(x), subnet) for x in (params, teacher.params)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)
    train_subnet(run, subnet, out="taught", teacher=export)

    # It starts from the same architecture's weights alone.
    data = prepare(run)
    started = first_weights.of_subnet(run, own, run.path / "more", data)
    jax.tree.map(np.testing.assert_array_equal, started, params)
    layer = dataclasses.replace(subnet.encoder.layers[0], experts=(8,))
    other = dataclasses.replace(
        own, subnet=dataclasses.replace(subnet, encoder=Encoder(8, (layer,)))
    )
    with pytest.raises(UserError, match="holds another evolved architecture"):
        first_weights.of_subnet(run, other, run.path / "more", data)

    # What an untrusted manifest says of kernels is checked, and no export lacks programs.
    spec = model_spec(config, subnet)
    with pytest.raises(UserError, match="evolved cells has none of the kernels"):
        write_export(params, spec, config.export, tmp_path / "none", "test", kernels=("native",))
    manifest = files.read_json(export / "manifest.json", "manifest")
    files.write_json(export / "manifest.json", {**manifest, "kernels": ["native", "xla"]})
    with pytest.raises(UserError, match=r"kernels is .*xla for evolved cells, not native"):
        Translator.load(export)
