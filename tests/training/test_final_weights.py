"""Which weights of a training are used: the last, a mean, a moving average, or the best."""

import contextlib
import dataclasses
import shutil

import jax
import numpy as np
import pytest
from small_training import CONFIG, DATA, TINY, KillAt, Killed, run_training

from automoe_jax.system.errors import UserError
from automoe_jax.training import checkpoints, loop
from automoe_jax.training.config import ModelConfig, TrainingConfig
from automoe_jax.training.evaluation import Evaluator, Score
from automoe_jax.training.step import TrainState
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


def unknown_loads(subnet):
    """Loads and entropies of a subnet's layers that say nothing."""
    layers = {
        (side, number): np.full(len(layer.experts), np.nan) for side, number, layer in subnet.layers
    }
    return layers, dict.fromkeys(layers, np.nan)


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


def test_an_average_leaves_out_what_a_stop_saved(tmp_path):
    """Between two checkpoints of the plan."""
    config = dataclasses.replace(
        CONFIG, keep_checkpoints=3, final_weights="average", averaged_checkpoints=2
    )
    run_training(tmp_path, config=config)
    expected, _ = of(tmp_path, config)
    store = tmp_path / checkpoints.CHECKPOINTS
    shutil.copytree(store / "2", store / "5")
    jax.tree.map(np.testing.assert_array_equal, of(tmp_path, config)[0], expected)


def test_what_a_stop_saved_takes_no_place_of_another(tmp_path):
    """Two of the even steps are kept, and the newest of all."""
    kept = []
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=2, every=2)) as store:
        for step in (2, 4, 5, 6, 7):
            weights = {"a": np.full(3, step, np.float32)}
            store.save(TrainState(np.int32(step), weights, weights), {})
            store.wait()
            kept.append(sorted(int(path.name) for path in tmp_path.glob("[0-9]*")))
    assert kept == [[2], [2, 4], [2, 4, 5], [4, 6], [4, 6, 7]]


def test_no_moving_average(each, tmp_path):
    """A run that kept none says so, rather than give other weights."""
    run_training(tmp_path)
    with pytest.raises(UserError, match="has no moving average of its weights"):
        of(tmp_path, final_weights="ema")


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
    """The moving average's, where there is one."""
    plain = run_training(tmp_path, config=dataclasses.replace(EACH, ema_decay=0.0))
    for (folder, values), kind in ((each[:2], "ema"), ((tmp_path, plain), "last")):
        weights, _ = of(folder, final_weights=kind)
        evaluator = Evaluator(TARGET, DATA.valid, EACH, 0)
        replicated = jax.tree.map(lambda x: np.stack([x] * jax.local_device_count()), weights)
        loss = evaluator.loss(replicated, TINY.largest())
        assert values[6, "valid/loss_largest"] == pytest.approx(loss, rel=1e-5)
    assert plain[6, "train/loss"] == each[1][6, "train/loss"]


@pytest.fixture
def losses(monkeypatch):
    """Validation losses of the evaluations to come; of all subnets alike."""
    given = []

    def scores(self, params, subnets):
        loss = given.pop(0)
        return {name: Score(loss, *unknown_loads(subnet)) for name, subnet in subnets.items()}

    monkeypatch.setattr(Evaluator, "scores", scores)
    return given


EVALUATED = dataclasses.replace(EACH, eval_every=1, ema_decay=0.0)


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


@pytest.mark.slow
def test_a_new_training_does_not_keep_the_best_of_another(each, tmp_path, losses):
    """Killed before its first checkpoint and begun again, or its checkpoints removed."""
    config = dataclasses.replace(EVALUATED, checkpoint_every=100)
    losses += [1.0]
    with pytest.raises(Killed):
        run_training(
            tmp_path, KillAt(3), config=dataclasses.replace(config, log_every=3, eval_every=2)
        )
    assert (tmp_path / checkpoints.BEST / "2").is_dir()
    losses[:] = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5]
    run_training(tmp_path, config=dataclasses.replace(EVALUATED, peak_rate=1e-3))
    ours, step = of(tmp_path, EVALUATED, final_weights="best")
    assert step == 2
    first = of(each[0])[0]
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, first)
    again = tmp_path / "again"
    losses[:] = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5]
    run_training(again, config=dataclasses.replace(EVALUATED, peak_rate=1e-3))
    expected, _ = of(again, EVALUATED, final_weights="best")
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [2]), (5, [2, 4])])
def test_best_weights_of_steps_to_come_are_dropped(tmp_path, step, kept):
    """Beside what a killed save left, which is not a step."""
    store = tmp_path / checkpoints.BEST
    for name in ("2", "4", "6.orbax-checkpoint-tmp"):
        (store / name).mkdir(parents=True)
    checkpoints.drop_best_beyond(tmp_path, step)
    assert sorted(int(p.name) for p in store.iterdir() if p.name.isdecimal()) == kept
    assert (store / "6.orbax-checkpoint-tmp").is_dir()


def test_patience_ends_a_training(tmp_path, losses):
    config = dataclasses.replace(EVALUATED, patience=2)
    losses += [3.0, 2.0, 2.5, 2.4, 1.0]
    notes = []
    run_training(tmp_path, Notes(notes), config=config)
    assert losses == [1.0]
    assert checkpoints.latest_step(tmp_path) == 4
    assert loop.has_ended(tmp_path, config)
    assert not loop.has_ended(tmp_path, EVALUATED)  # without patience
    assert not loop.has_ended(tmp_path / "none", config)
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
