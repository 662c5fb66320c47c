"""Teachers: a trained subnet, a supernet's largest, an export, and what is none."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import logits_of
from programs import launch
from published_spaces import SPACE
from tiny import tiny_flags

from automoe_jax.architecture.subnet import to_json
from automoe_jax.config import base, from_stored, resolve
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.model.extract import inherited
from automoe_jax.phases import teachers
from automoe_jax.phases.convert import convert
from automoe_jax.phases.export import export_params
from automoe_jax.phases.run import Run, open_run
from automoe_jax.phases.train import train_subnet, train_supernet
from automoe_jax.phases.weights import subnet_params, supernet_params, target
from automoe_jax.system import files
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


def test_a_converted_checkpoint_teaches(shared, tmp_path):
    config = base()
    config.space.update(dataclasses.asdict(SPACE))
    run = Run(resolve(config), tmp_path / "run", Silent())
    convert(run, shared / "fixtures/superA.npz", TokenizerConfig(kind="ids"))
    ids = tokenizers.load(run.tokenizer)
    found = teachers.load(run.path, ids, Silent())
    params, _ = supernet_params(run, ids.vocab_sizes)
    largest = SPACE.largest()
    assert_teaches(found, run, largest, inherited(params, largest, SPACE))
    assert teachers.origin(run.path).startswith("largest subnet of the supernet, converted from ")


@pytest.mark.slow
def test_a_teacher_that_became_another(trained, tmp_path):
    """What has begun to learn from one does not go on with another; what has ended may stay."""
    run, _ = trained
    params, subnet, _ = subnet_params(run)
    teacher = tmp_path / "export"

    student = dataclasses.replace(run, path=tmp_path / "student")
    learn = functools.partial(train_subnet, student, subnet, teacher=teacher)
    export_params(run, params, subnet, teacher, "a test")
    learn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "has_ended", lambda *_: False)
        export_params(run, params, subnet, teacher, "another test")
        words = (
            f"has learned from another model in {teacher}: it was 'a test' and is 'another test'"
        )
        with pytest.raises(UserError, match=words):
            learn()
        manifest = student.path / "subnet/manifest.json"
        content = files.read_json(manifest, "manifest")
        del content["config"]["teacher_origin"]  # as earlier versions wrote it
        files.write_json(manifest, content)
        learn()
    learn()


@pytest.mark.slow
def test_a_student_that_has_ended_needs_its_teacher_no_more(trained, tmp_path):
    run, _ = trained
    teacher = open_run(run.config, tmp_path / "teacher", Silent())
    student = dataclasses.replace(run, path=tmp_path / "student")
    subnet = run.config.space.smallest()
    train_subnet(teacher, subnet)
    train_subnet(student, subnet, teacher=teacher.path)
    shutil.rmtree(teacher.path / "subnet/checkpoints")
    before = (student.path / "subnet/manifest.json").read_bytes()
    train_subnet(student, subnet, teacher=teacher.path)
    assert (student.path / "subnet/manifest.json").read_bytes() == before


@pytest.mark.slow
def test_where_the_weights_of_a_teacher_come_from(trained, tmp_path):
    run, _ = trained
    assert teachers.origin(run.path) == "trained subnet, step 2"
    assert teachers.origin(run.path / "supernet") == "largest subnet of the supernet, step 2"
    kinds = {
        "best": "trained subnet, step 1, lowest validation loss",
        "average": "trained subnet, step 3, mean of the last checkpoints (2)",
    }
    # At this rate no step makes the loss better.
    steps = {"steps": 3, "warmup_steps": 0, "peak_rate": 1e-30, "eval_every": 1}
    training = dataclasses.replace(
        run.config.subnet_training, **steps, initial_rate=0.0, final_rate=0.0,
        averaged_checkpoints=2, keep_checkpoints=2, checkpoint_every=1,
    )  # fmt: skip
    for kind, words in kinds.items():
        own = dataclasses.replace(training, final_weights=kind)
        config = dataclasses.replace(run.config, subnet_training=own)
        other = open_run(config, tmp_path / kind, Silent())
        train_subnet(other, run.config.space.smallest())
        assert teachers.origin(other.path) == words
        assert subnet_params(other)[2] == int(words.split()[3].strip(","))


@pytest.mark.slow
def test_the_program(tmp_path):
    run, student = tmp_path / "run", tmp_path / "student"
    done = launch("train", *tiny_flags(), f"--workdir={run}")
    assert done.returncode == 0, done.stderr.decode()
    stored = files.read_json(run / "supernet/manifest.json", "manifest")["config"]
    smallest = from_stored(stored).space.smallest()
    (tmp_path / "subnet.json").write_text(json.dumps(to_json(smallest)))
    short = ["--config.subnet_training.steps=2", "--config.subnet_training.warmup_steps=1"]
    command = [*tiny_flags(), *short, f"--workdir={student}", f"--subnet={tmp_path}/subnet.json"]
    done = launch("train", *command, f"--teacher={run}/supernet")
    assert done.returncode == 0, done.stderr.decode()
    words = f"teacher: {run}/supernet (largest subnet of the supernet, step 6)"
    assert words in done.stderr.decode()
    learned = files.read_json(student / "subnet/manifest.json", "manifest")["config"]
    assert learned["teacher"] == f"{run}/supernet"
    assert learned["teacher_origin"] == "largest subnet of the supernet, step 6"


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
