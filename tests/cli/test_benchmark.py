"""`launch/benchmark.py` on exports with random weights."""

import json

import jax
import numpy as np
import pytest
from conftest import elastic_space, evolved_space, random_evolved, random_params
from programs import launch

from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.export import export
from automoe_jax.decoding.parts import PARTS
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.model.extract import extract


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A subnet, and evolved cells."""
    folder = tmp_path_factory.mktemp("exports")
    space = elastic_space()
    hull, subnet = space.hull(), space.largest()
    params = jax.tree.map(np.asarray, extract(random_params(space), subnet, hull))
    models = {"a": (space, subnet, params)}
    models["b"] = evolved_space(), evolved_space().largest(), random_evolved()
    for name, (own, arch, weights) in models.items():
        spec = ModelSpec(arch, own.hull().encoder.embed_dim, own.hull().decoder.embed_dim)
        export(weights, spec, ExportConfig((2,)), folder / name, "test", programs=False)
    return [str(folder / name) for name in models]


def benchmark(exports, *more: str) -> str:
    flags = "--runs=8", "--threads=1", "--beam_size=2", "--source_length=6", "--target_length=5"
    done = launch("benchmark", f"--export={','.join(exports)}", *flags, *more)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_parts_of_the_latency_of_two_exports(exports):
    """Times add up to what a translation takes; with --json as numbers, else in a table.

    So many runs that what else the machine does falls to those that are dropped.
    """
    found = json.loads(benchmark(exports, "--parts", "--json", "--runs=40").splitlines()[-1])[
        "exports"
    ]
    assert [row["export"] for row in found] == exports
    for row in found:
        assert list(row["parts_ms"]) == list(PARTS)
        assert all(low <= ms <= high for ms, low, high in row["parts_ms"].values())
        whole = row["inputs"]["mixed words"]["mean_ms"]
        assert sum(ms for ms, *_ in row["parts_ms"].values()) == pytest.approx(whole, rel=0.9)
    table = benchmark(exports, "--parts")
    for word in ("encoder", "beam", "output"):
        assert word in table
    assert "parts_ms" not in benchmark(exports[:1], "--json")
