"""Which weights of a training are used: the last, a mean, a moving average, or the best."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from small_training import CONFIG, DATA, TINY, KillAt, Killed, run_training

from automoe_jax.system.errors import UserError
from automoe_jax.training import checkpoints
from automoe_jax.training.config import ModelConfig, TrainingConfig
from automoe_jax.training.evaluation import Evaluator, Score
from automoe_jax.training.target import TrainingTarget, abstract_state, initial_state

TARGET = TrainingTarget(TINY, (64, 64), ModelConfig(0.1, 0.1))
DECAY = 0.6
# Every step is kept.
EACH = dataclasses.replace(CONFIG, checkpoint_every=1, keep_checkpoints=6, ema_decay=DECAY)


def of(folder, config=EACH, **fields):
    """(weights, step)."""
    return checkpoints.load_params(
        TARGET, dataclasses.replace(config, **fields), folder, pytest.fail
    )


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    """A run with a checkpoint of every step, and their weights in order."""
    folder = tmp_path_factory.mktemp("run")
    values = run_training(folder, config=EACH)
    abstract = abstract_state(TARGET, EACH, 7)._replace(opt_state=None)
    store = checkpoints.Checkpoints(folder / checkpoints.CHECKPOINTS, read_only=True)
    found = [own.params for own in store.readable(abstract, pytest.fail)][::-1]
    store.close()
    return folder, values, found


def assert_alike(ours, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected
    )


def test_the_mean_of_the_last_checkpoints(each):
    folder, _, weights = each
    ours, step = of(folder, final_weights="average", averaged_checkpoints=3)
    assert step == 6
    assert_alike(ours, jax.tree.map(lambda *xs: sum(xs) / 3, *weights[3:]))
    assert_alike(of(folder)[0], weights[-1])


def test_fewer_checkpoints_than_asked_for_are_said(each):
    notes = []
    config = dataclasses.replace(
        EACH, final_weights="average", averaged_checkpoints=9, keep_checkpoints=9
    )
    ours, _ = checkpoints.load_params(TARGET, config, each[0], notes.append)
    assert_alike(ours, jax.tree.map(lambda *xs: sum(xs) / 6, *each[2]))
    assert "has 6 checkpoints, not 9" in notes[0]


def test_the_moving_average(each):
    """By hand: a decay of (1 + n) / (10 + n), then DECAY."""
    folder, _, weights = each
    mean = jax.tree.map(np.asarray, initial_state(TARGET, EACH, 7).params)
    for n, own in enumerate(weights):
        decay = min(DECAY, (1 + n) / (10 + n))
        mean = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, mean, own)
    ours, step = of(folder, final_weights="ema")
    assert step == 6
    assert_alike(ours, mean)


def test_a_killed_run_has_the_same_moving_average(each, tmp_path):
    for step in (3, 4):
        with pytest.raises(Killed):
            run_training(tmp_path, KillAt(step), config=EACH)
    assert run_training(tmp_path, config=EACH) == each[1]
    pair = (of(folder, final_weights="ema")[0] for folder in (each[0], tmp_path))
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_validation_is_of_the_weights_that_are_used(each, tmp_path):
    """The log of a run whose moving average is used has other losses, that of its average."""
    config = dataclasses.replace(EACH, final_weights="ema")
    found = run_training(tmp_path, config=config)
    assert {k: v for k, v in found.items() if k[1].startswith("train")} == {
        k: v for k, v in each[1].items() if k[1].startswith("train")
    }
    evaluator = Evaluator(TARGET, DATA.valid, config, 0)
    replicated = jax.tree.map(
        lambda x: np.stack([x] * jax.local_device_count()), of(tmp_path, config)[0]
    )
    loss = evaluator.loss(replicated, TINY.largest())
    assert found[6, "valid/loss_largest"] == pytest.approx(loss, rel=1e-5)


@pytest.fixture
def losses(monkeypatch):
    """Validation losses of the evaluations to come; of all subnets alike."""
    given = []

    def scores(self, params, subnets):
        loss = given.pop(0)
        return {name: Score(loss, {}, {}) for name in subnets}

    monkeypatch.setattr(Evaluator, "scores", scores)
    return given


EVALUATED = dataclasses.replace(EACH, eval_every=1)


def test_the_best_weights_are_kept(each, tmp_path, losses):
    losses += [3.0, 2.0, float("nan"), 2.5, 2.0, 2.2]
    run_training(tmp_path, config=EVALUATED)
    ours, step = of(tmp_path, final_weights="best")
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, ours, each[2][1])


def test_a_killed_run_keeps_the_same_best(tmp_path, losses):
    whole = [3.0, 2.0, 2.5, 1.5, 1.5, 1.6]
    losses += whole
    with pytest.raises(Killed):
        run_training(tmp_path, KillAt(3), config=EVALUATED)
    losses[:] = whole[checkpoints.latest_step(tmp_path) :]
    run_training(tmp_path, config=EVALUATED)
    assert of(tmp_path, final_weights="best")[1] == 4


def test_patience_ends_a_training(tmp_path, losses):
    config = dataclasses.replace(EVALUATED, patience=2)
    losses += [3.0, 2.0, 2.5, 2.4, 1.0]
    notes = []
    run_training(tmp_path, Notes(notes), config=config)
    assert losses == [1.0]
    assert checkpoints.latest_step(tmp_path) == 4
    assert notes[-1] == (
        "validation loss has not fallen for 2 evaluations: the training ends at step 4"
    )
    run_training(tmp_path, config=config)  # it has ended: nothing happens
    assert losses == [1.0]


class Notes(KillAt):
    def __init__(self, notes):
        super().__init__(None)
        self.note = notes.append


def test_no_best_yet(each, tmp_path):
    """A folder of an earlier version has none."""
    with pytest.raises(UserError, match="has no checkpoint"):
        of(tmp_path, final_weights="best")
    name = checkpoints.CHECKPOINTS
    shutil.copytree(each[0] / name, tmp_path / name)
    with pytest.raises(UserError, match="has no best_checkpoint"):
        of(tmp_path, final_weights="best")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"final_weights": "mean"}, "final_weights is 'mean'; allowed: last, average, ema, best"),
        ({"final_weights": "ema"}, "final_weights is 'ema', but ema_decay is 0"),
        ({"final_weights": "average"}, "averaged_checkpoints is 5, but keep_checkpoints is 2"),
        ({"patience": 2, "eval_every": 0}, "patience is 2, but eval_every is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; allowed: 0 up to below 1"),
        ({"schedule": "step"}, "schedule is 'step'; allowed: cosine, inverse_sqrt, linear"),
    ],
)
def test_mistakes(fields, words):
    with pytest.raises(UserError, match=words):
        TrainingConfig(**fields)
