"""The benchmarks that wait for an accelerator, tried on a CPU at tiny sizes."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.ops import grouped_ffn as op
from automoe_jax.system import chips

ARGUMENTS = argparse.Namespace(embed_dim=16, routing="uniform", backend=None, runs=2)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
     ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("NVIDIA H100 PCIe", None), ("cpu", None),
     ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_published_peaks(kind, peak):
    assert chips.peak_flops(kind) == peak


def test_experts_beside_a_dense_layer(benchmark, monkeypatch):
    """Rates by hand from the times; on an accelerator only the row that is judged has a goal."""
    grouped_ffn = benchmark("grouped_ffn")
    row = grouped_ffn.compare(ARGUMENTS, 64, [8, 8], jnp.float32)
    # Two products, forward and two times backward, 2 FLOPs each, of 64 tokens of 16 through 8.
    assert row["useful_gflop"] == pytest.approx(2 * 3 * 2 * 64 * 16 * 8 / 1e9)
    median = {name: seconds["median"] for name, seconds in row["seconds"].items()}
    assert row["grouped_gflops"] == pytest.approx(row["useful_gflop"] / median["grouped"])
    assert row["speed_of_dense_layer"] * median["grouped"] == median["dense_of_same_flops"]
    assert grouped_ffn.Problem(64, 16, [8, 24], jnp.float32, "skewed", None).mean_size in range(
        8, 25
    )
    assert len(grouped_ffn.goals_of(row)) == 3
    assert "share_of_peak" not in row

    monkeypatch.setattr(chips, "peak_flops", lambda kind: 1e12)
    monkeypatch.setattr(op, "default_backend", lambda: "loop")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    row = grouped_ffn.compare(ARGUMENTS, 64, [8, 24], jnp.bfloat16)
    assert row["seconds"].keys() == {"grouped", "dense_of_same_flops", "matmul"}
    assert row["share_of_peak"] == pytest.approx(row["grouped_gflops"] / 1e3)
    assert not grouped_ffn.goals_of(row)
    judged = {**row, "tokens": 32768, "speed_of_dense_layer": 0.59}
    assert not grouped_ffn.goals_of(judged)["speed_of_dense_layer"]["met"]


@pytest.mark.slow
def test_a_step_beside_the_dense_model(benchmark, monkeypatch):
    """The FLOPs of both are equal, so their rates are as their times."""
    accelerator_step = benchmark("accelerator_step")
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 1e12)
    space = SearchSpace(**accelerator_step.SMALL)
    found = accelerator_step.compare(space, 64, "bfloat16", 512, 2)
    times = {name: found[name]["seconds"]["median"] for name in ("dense", "largest")}
    assert found["share_of_dense"] == pytest.approx(times["dense"] / times["largest"])
    assert found["largest"]["share_of_peak"] == pytest.approx(found["largest"]["tflops"])
