"""Teachers: a trained subnet, a supernet's largest, an export, and what is none."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import logits_of

from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.model.extract import inherited
from automoe_jax.phases import teachers
from automoe_jax.phases.export import export_params
from automoe_jax.phases.run import open_run
from automoe_jax.phases.train import train_subnet, train_supernet
from automoe_jax.phases.weights import subnet_params, supernet_params, target
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training import loop


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A workdir with a supernet and a subnet of some steps."""
    run, data, _, _ = prepared
    training = dataclasses.replace(run.config.subnet_training, steps=2, warmup_steps=1)
    config = dataclasses.replace(run.config, subnet_training=training, training=training)
    run = open_run(config, tmp_path_factory.mktemp("teacher"), Silent())
    subnet = config.space.sample(np.random.default_rng(1))
    train_supernet(run)
    train_subnet(run, subnet)
    return run, data


def assert_teaches(teacher, run, subnet, params, tolerance=1e-5):
    """The teacher's logits are those of a subnet with these weights."""
    ids = np.random.default_rng(0).integers(4, 60, (3, 6)).astype(np.int32)
    sizes = teacher.module.vocab_sizes
    own = target(run.config, sizes, subnet).module()
    ours, theirs = (
        logits_of(module, jax.tree.map(np.asarray, weights), ids, ids)
        for module, weights in ((teacher.module, teacher.params), (own, params))
    )
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_a_workdir_teaches(trained):
    run, data = trained
    found = teachers.load(run.path, data.tokenizer, Silent())
    params, subnet, _ = subnet_params(run)
    assert_teaches(found, run, subnet, params)
    found = teachers.load(run.path / "supernet", data.tokenizer, Silent())
    params, _ = supernet_params(run, data.tokenizer.vocab_sizes)
    largest = run.config.space.largest()
    assert_teaches(found, run, largest, inherited(params, largest, run.config.space))


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 1e-5), ("int8", 0.1)])
def test_an_export_teaches(trained, tmp_path, quantize, tolerance):
    run, data = trained
    exporting = dataclasses.replace(run.config.export, quantize=quantize)
    own = dataclasses.replace(run, config=dataclasses.replace(run.config, export=exporting))
    params, subnet, _ = subnet_params(run)
    export_params(own, params, subnet, tmp_path / "export", "a test")
    found = teachers.load(tmp_path / "export", data.tokenizer, Silent())
    assert_teaches(found, run, subnet, params, tolerance)


def test_a_subnet_learns_from_its_teacher(trained, tmp_path, monkeypatch):
    """The loop gets the teacher; a new workdir takes its tokenizer; the loss is another one."""
    run, _ = trained
    given = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda *own: given.append(own) or train(*own))
    # Its own would have other pieces.
    words = dataclasses.replace(run.config.tokenizer, max_sentences=100)
    config = dataclasses.replace(run.config, tokenizer=words)
    student = dataclasses.replace(run, path=tmp_path / "student", config=config)
    subnet = run.config.space.smallest()
    train_subnet(student, subnet, teacher=run.path)
    theirs, own = (tokenizers.load(x.tokenizer).content for x in (run, student))
    assert own == theirs
    assert given[0][-1]().module.arch == subnet_params(run)[1]
    alone = dataclasses.replace(run, path=tmp_path / "alone")
    train_subnet(alone, subnet)
    taught, plain = (subnet_params(own)[0] for own in (student, alone))
    arrays = zip(jax.tree.leaves(taught), jax.tree.leaves(plain), strict=True)
    assert any((a != b).any() for a, b in arrays)


def test_what_is_no_teacher(trained, prepared, tmp_path):
    run, data = trained
    with pytest.raises(UserError, match="is neither a workdir nor an export"):
        teachers.load(tmp_path, data.tokenizer, Silent())
    open_run(run.config, tmp_path / "new", Silent())
    with pytest.raises(UserError, match="has no trained model to learn from"):
        teachers.load(tmp_path / "new", data.tokenizer, Silent())
    other = dataclasses.replace(
        run.config, tokenizer=dataclasses.replace(run.config.tokenizer, vocab_size=290)
    )
    student = dataclasses.replace(run, path=tmp_path / "other", config=other)
    train_subnet(student, run.config.space.smallest())
    with pytest.raises(UserError, match="is not the tokenizer of the model that this one"):
        train_subnet(student, run.config.space.smallest(), out="taught", teacher=run.path)
    with pytest.raises(UserError, match="has another tokenizer than the model that learns"):
        teachers.load(run.path, tokenizers.load(student.tokenizer), Silent())
