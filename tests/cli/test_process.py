"""JAX looks for no TPU where libtpu is but no TPU: libtpu would take seconds and write warnings."""

import importlib.util
import os
import subprocess
import sys

import pytest

from automoe_jax.cli import process

PROGRAM = """
from automoe_jax.cli import process
process.prepare(compiling=False)
import jax
print(jax.devices()[0].platform)
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes a machine with some packages and PCI devices; returns what JAX_PLATFORMS becomes."""

    def make(packages, vendors, **environment):
        spec = importlib.util.find_spec("json")
        found = {name: spec for name in packages}
        monkeypatch.setattr(importlib.util, "find_spec", found.get)
        for number, vendor in enumerate(vendors):
            device = tmp_path / f"0000:00:{number:02}.0"
            device.mkdir()
            (device / "vendor").write_text(f"{vendor}\n")
        monkeypatch.setattr(process, "_PCI_DEVICES", tmp_path)
        monkeypatch.delenv("JAX_PLATFORMS")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        process.prepare(compiling=False)
        return os.environ.get("JAX_PLATFORMS")

    return make


def test_no_tpu_is_looked_for_where_none_is(machine):
    assert machine(["libtpu"], ["0x8086", "0x1af4"]) == "cpu"


@pytest.mark.parametrize(
    ("packages", "vendors"),
    [
        ([], []),
        (["libtpu"], ["0x8086", "0x1ae0"]),  # a TPU
        (["libtpu", "jax_plugins"], []),  # perhaps a GPU
    ],
)
def test_jax_chooses_by_itself(machine, packages, vendors):
    assert machine(packages, vendors) is None


@pytest.mark.parametrize("own", [{"JAX_PLATFORMS": "tpu"}, {"JAX_FORCE_TPU_INIT": "1"}])
def test_the_users_choice_stays(machine, own):
    assert machine(["libtpu"], [], **own) == own.get("JAX_PLATFORMS")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or not process._has_libtpu_alone(),
    reason="needs libtpu (pip install '.[tpu]') and no TPU or GPU",
)
def test_nothing_is_written_about_the_missing_tpu(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    del environment["JAX_PLATFORMS"]
    environment.pop("TPU_LIBRARY_PATH", None)  # JAX sets it when it is imported
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")
