"""The comparison of systems from its first part to its last, on a corpus of 500 sentences."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from automoe_jax.architecture.subnet import from_json
from automoe_jax.phases.comparison import of_study
from automoe_jax.system import files
from benchmarks.paper_systems import KINDS

pytestmark = pytest.mark.slow


def test_every_kind_of_part_is_done_once(tmp_path):
    results = tmp_path / "paper_quickstart.jsonl"
    names = "automoe,automoe_calibrated,mini_transformer_4_1"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "paper_tables.py"), "--corpus=quickstart",
        "--json", "--seeds=1", f"--only={names}", f"--workdir={tmp_path / 'runs'}",
        f"--results={results}",
    ]  # fmt: skip

    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device

    def run():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    rows = run()["rows"]
    assert {row["kind"] for row in rows} == set(KINDS)
    lines = files.read_json_lines(results)
    assert len(lines) == len(rows)
    by_kind = {kind: [x for x in lines if x["kind"] == kind] for kind in KINDS}
    (ranking,) = by_kind["ranking"]
    assert (len(ranking["subnets"]), ranking["updates"]) == (9, 5)
    assert {x["name"] for x in by_kind["search"]} == {"automoe", "automoe_calibrated"}
    assert {x["name"] for x in by_kind["model"]} == set(names.split(","))
    for search in by_kind["search"]:
        (model,) = (x for x in by_kind["model"] if x["name"] == search["name"])
        assert from_json(model["subnet"]) == from_json(search["subnet"])
        low, high = model["fp32"]["bleu_95"]
        assert low <= high
        assert low <= model["fp32"]["bleu"] + 0.5
    for latency in by_kind["latency"]:
        assert 0 < latency["fp32"]["of_reference"][0] < 2
    others = {x["name"]: x for x in by_kind["difference"]}
    assert set(others) == {"automoe_calibrated", "mini_transformer_4_1"}
    assert len(others["automoe_calibrated"]["inherited"]) == 2
    models, examples = of_study(results)  # the pages can be made of it
    assert len(models) == len(by_kind["model"])
    assert examples
    # Nothing is left to do.
    assert run()["rows"] == rows
    assert len(files.read_json_lines(results)) == len(lines)
