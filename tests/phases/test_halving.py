"""Successive halving, with training replaced by a formula."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import KillAt, Killed

from automoe_jax.architecture.subnet import from_json
from automoe_jax.phases import halving
from automoe_jax.phases.rank import spread
from automoe_jax.published import subnet_files
from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent


def test_the_better_half_is_trained_on(prepared, tmp_path, monkeypatch):
    """Rounds of 5, 3 and 2 candidates; a kill repeats nothing; the slow starter is lost."""
    run = prepared[0]
    run = dataclasses.replace(run, path=tmp_path)
    subnets = spread(run.config.space, 5, seed=0)
    calls = []

    def train(own, subnet, init_from=None, out="", *, after=None):
        nth = int(out.rpartition("_")[2])
        calls.append((subnets.index(subnet), nth, own.config.subnet_training.steps))
        assert init_from is None  # this workdir has no supernet
        assert (after is None) == (nth == 1)
        if after is not None:
            assert (tmp_path / after).is_dir()
        (tmp_path / out).mkdir(parents=True)

    def loss(own, out):
        """Falls with updates; the last candidate starts badly and would end best."""
        i, nth, _ = calls[-1]
        return 5.0 - nth + 0.1 * i if i < 4 else 9.0 - 4 * nth

    monkeypatch.setattr(halving, "train_subnet", train)
    monkeypatch.setattr(halving, "trained_loss", loss)

    def halve(progress):
        return halving.halve(dataclasses.replace(run, progress=progress), "h", subnets, 100)

    with pytest.raises(Killed):
        halve(KillAt("round 2"))
    result = halve(Silent())
    assert calls == [
        *((i, 1, 100) for i in range(5)), *((i, 2, 200) for i in range(3)),
        *((i, 3, 400) for i in range(2)),
    ]  # fmt: skip
    assert [from_json(row["subnet"]) for row in result["subnets"]] == subnets
    np.testing.assert_allclose(result["subnets"][0]["losses"], [4.0, 3.0, 2.0])
    assert [len(row["losses"]) for row in result["subnets"]] == [3, 3, 2, 1, 1]
    assert result["updates"] == 5 * 100 + 3 * 200 + 2 * 400
    assert subnet_files.load(tmp_path / "h" / "best.json") == subnets[0]
    assert result == json.loads((tmp_path / "h" / "halving.json").read_text()) == halve(Silent())
    assert len(calls) == 10
    assert not (tmp_path / "h" / "1").exists()  # weights are not kept
    # Killed while the trainings were removed, it has its result and removes the rest.
    (tmp_path / "h" / "2" / "round_3").mkdir(parents=True)
    assert halve(Silent()) == result
    assert not (tmp_path / "h" / "2").exists()


def test_a_supernet_that_was_trained_on(prepared, tmp_path, monkeypatch):
    run = dataclasses.replace(prepared[0], path=tmp_path)
    subnets = spread(run.config.space, 4, seed=0)
    step = [8]

    def train(own, subnet, init_from=None, out="", **_):
        assert init_from == tmp_path
        (tmp_path / out).mkdir(parents=True)

    monkeypatch.setattr(halving, "latest_step", lambda folder: step[0])
    monkeypatch.setattr(halving, "train_subnet", train)
    monkeypatch.setattr(halving, "trained_loss", lambda *_: 3.0)
    killed = dataclasses.replace(run, progress=KillAt("loss 3.0"))
    with pytest.raises(Killed):
        halving.halve(killed, "h", subnets[:2], 10)
    step[0] = 16
    with pytest.raises(UserError, match=r"supernet_step is 8 there and 16 here; .*another --out"):
        halving.halve(run, "h", subnets[:2], 10)
    # Earlier versions did not write the step: their halvings go on.
    stored = workdir.settings(tmp_path / "h", "halving")
    del stored["supernet_step"]
    workdir.write(tmp_path / "h", "halving", {"config": stored})
    assert halving.halve(run, "h", subnets[:2], 10)["updates"] == 20


def test_candidates_start_from_another_workdir(prepared, tmp_path, monkeypatch):
    """In their first round, whether this workdir has a supernet or not; what that took is told."""
    run = dataclasses.replace(prepared[0], path=tmp_path)
    subnets, dense = spread(run.config.space, 4, seed=0), tmp_path / "dense"
    starts, clock, step = [], iter(np.arange(100.0)), [8]

    def train(own, subnet, init_from=None, out="", *, after=None):
        starts.append((init_from, after is not None))
        (tmp_path / out).mkdir(parents=True)

    monkeypatch.setattr(halving, "latest_step", lambda folder: step[0])
    monkeypatch.setattr(halving, "train_subnet", train)
    monkeypatch.setattr(halving, "trained_loss", lambda *_: 3.0)
    monkeypatch.setattr(halving.time, "monotonic", lambda: next(clock))
    result = halving.halve(run, "h", subnets, 10, dense)
    assert starts == [(dense, False)] * 4 + [(None, True)] * 2
    assert (result["init_from"], result["inherit"]) == ("dense", False)
    assert result["seconds"] == 6  # one for each training
    with pytest.raises(UserError, match=r"init_from is 'dense' there and 'other' here"):
        halving.halve(run, "h", subnets, 10, tmp_path / "other")
    step[0] = 16
    with pytest.raises(UserError, match=r"init_step is 8 there and 16 here"):
        halving.halve(run, "h", subnets, 10, dense)
