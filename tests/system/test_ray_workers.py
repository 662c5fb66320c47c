"""Parts on a Ray cluster of two nodes on this machine, one of which is lost on the way."""

import dataclasses
import functools
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from automoe_jax.model.extract import inherited
from automoe_jax.phases import distill, halving
from automoe_jax.phases import rank as ranking
from automoe_jax.phases import search_seeds as seeds
from automoe_jax.phases.distill import Distillation, Teacher
from automoe_jax.phases.export import export_params
from automoe_jax.phases.pipeline import run_pipeline
from automoe_jax.phases.prepare import open_splits, prepare
from automoe_jax.phases.run import Run, each_part, open_run
from automoe_jax.phases.train import train_supernet
from automoe_jax.phases.weights import searched_params
from automoe_jax.system.errors import UserError
from automoe_jax.system.parts import HERE, Workers
from automoe_jax.system.progress import Silent
from automoe_jax.system.ray_workers import RayWorkers, connect
from automoe_jax.training import loop
from automoe_jax.training.target import TrainingTarget
from benchmarks import trainings

GB = 2**30


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes with a core and 4 GiB each, and a head without cores."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    # The nodes cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    node = {"memory": 4 * GB, "object_store_memory": 100_000_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token to the home folder
        with warnings.catch_warnings(action="ignore"):  # JAX warns of the processes it starts
            found = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
            for _ in range(2):
                found.add_node(**node, num_cpus=1)
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def workers(cluster):
    return RayWorkers(cluster.address, cores=1, memory_gb=1.0)


def square(part: int) -> tuple[int, str | None]:
    return part * part, os.environ.get("NPROC")


def refuse(part: int):
    raise UserError(f"part {part} cannot be done")


def first_waits(folder: Path, part: int) -> int:
    """Part 0 waits for the end of the node, the first time that it runs."""
    import ray  # noqa: PLC0415

    node = ray.get_runtime_context().get_node_id()
    try:
        (folder / f"{part}").write_text(node)
        with (folder / f"begun_{part}").open("x"):
            pass
    except FileExistsError:
        return part + 100
    while part == 0:
        time.sleep(0.05)
    return part + 100


def test_every_part_comes_back_with_its_index(workers):
    found = dict(workers.each(square, iter(range(9))))
    assert found == {i: (i * i, "1") for i in range(9)}


def test_mistakes_are_one_line(workers):
    with pytest.raises(UserError, match=r"^part 3 cannot be done$"):
        list(workers.each(refuse, [3]))
    greedy = dataclasses.replace(workers, cores=2)
    with pytest.raises(UserError, match=r"has 2 cores and 1 GB .*the largest: 1 cores, 4\.0 GB"):
        list(greedy.each(square, [1]))
    with pytest.raises(UserError, match="--ray_cores is 0"):
        dataclasses.replace(workers, cores=0)


@pytest.mark.parametrize("address", ["nonsense", "localhost:1", "localhost:99999"])
def test_a_wrong_address_is_told_in_seconds(address):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.shutdown()  # what other tests connected
    with pytest.raises(UserError, match=rf"--ray.*{address}"):
        connect(address)


def test_auto_is_the_cluster_of_this_machine(cluster, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.shutdown()  # what other tests connected
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    workers = RayWorkers("auto", cores=1, memory_gb=1.0)
    assert workers.slots() == 2
    assert dict(workers.each(square, [4])) == {0: (16, "1")}


def test_a_corpus_is_the_same_as_of_this_process(workers, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 200)
    run, _, _, params = prepared
    subnet, export = run.config.space.smallest(), tmp_path / "export"
    export_params(run, inherited(params, subnet, run.config.space), subnet, export, "a test")
    for name, own in (("here", run), ("there", dataclasses.replace(run, workers=workers))):
        folder = tmp_path / name
        distill.distill(own, open_splits(run), Teacher(export), Distillation(2), folder)
        monkeypatch.setattr(distill, "_loaded", pytest.fail)  # in this process; not on the nodes
    for path in (tmp_path / "here").glob("*.[de][en]"):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
        assert path.stat().st_size


def halved(run: Run):
    found = halving.halve(run, "halved", ranking.spread(run.config.space, 4, 0), 2)
    assert found.pop("seconds") > 0
    return found


def ranked(run: Run):
    data = prepare(run)
    params, step = searched_params(run, data.tokenizer.vocab_sizes, untrained=False)
    return ranking.rank(run, "ranked", data, params, step, ranking.RankingSettings(count=4))


def searched(run: Run):
    return seeds.search_seeds(run, "seeds", [0, 1])


def finished(run: Run):
    """A pipeline's figures; what is timed differs from run to run."""
    results = run_pipeline(run)
    return {name: results[name] for name in ("test", "random")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A workdir with a trained supernet."""
    folder = tmp_path_factory.mktemp("trained")
    train_supernet(open_run(tiny_config(), folder, Silent()))
    return folder


def train_no_subnet(train: Callable, target: TrainingTarget, *given: Any):
    assert target.subnet is None
    train(target, *given)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [halved, ranked, searched, finished])
def test_a_phase_finds_the_same_as_in_this_process(workers, trained, tmp_path, monkeypatch, phase):
    """To roundings: this process computes with more threads than a node."""

    def found(name: str, own: Workers) -> dict[str, Any]:
        shutil.copytree(trained, tmp_path / name)
        return dict(flat(phase(open_run(tiny_config(), tmp_path / name, Silent(), own))))

    here = found("here", HERE)
    # In this process; not on the nodes.
    monkeypatch.setattr(loop, "train", functools.partial(train_no_subnet, loop.train))
    monkeypatch.setattr(seeds, "search", pytest.fail)
    there = found("there", workers)
    assert here.keys() == there.keys()
    for key, value in here.items():
        near = pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
        assert there[key] == near, key


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value, by path."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, own in items:
        yield from flat(own, f"{path}/{key}")


def test_a_benchmark_trains_on_a_cluster(workers):
    """Its commands run on nodes, each on one; one that fails ends the program with its words."""
    printed = {}

    def job(part: str, core: trainings.Core):
        assert isinstance(core, RayWorkers)
        code = f"import os; print({part!r}, os.environ['NPROC'])"  # set on nodes alone
        printed[part] = trainings.run_on_core(core, [sys.executable, "-c", code])

    trainings.on_each_core(job, ["a", "b", "c"], workers)
    assert printed == {part: f"{part} 1\n" for part in "abc"}
    with pytest.raises(SystemExit, match=r"ended with 1:\n.*no such part"):
        trainings.run_on_core(workers, [sys.executable, "-c", "raise SystemExit('no such part')"])


def test_a_run_is_for_the_workers_alone(workers, tmp_path):
    run = open_run(tiny_config(), tmp_path / "seen", Silent(), workers)
    [(_, found)] = each_part(run, getattr, ["workers"])
    assert not found.remote
    run = dataclasses.replace(run, path=tmp_path / "not there")
    with pytest.raises(UserError, match="use a --workdir that all nodes see"):
        list(each_part(run, getattr, ["workers"]))


def test_parts_of_a_lost_node_run_again(cluster, workers, tmp_path):
    """Last: the cluster loses its second node."""
    parts = workers.each(functools.partial(first_waits, tmp_path), range(6))
    found = dict([next(parts)])
    while not (tmp_path / "begun_0").exists():
        found |= dict([next(parts)])
    waiting = (tmp_path / "0").read_text()
    lost = next(node for node in cluster.list_all_nodes() if node.node_id == waiting)
    cluster.remove_node(lost, allow_graceful=False)
    found |= dict(parts)
    assert found == {i: i + 100 for i in range(6)}
    assert (tmp_path / "0").read_text() != waiting
