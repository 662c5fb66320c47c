"""The project's own promises: one list of dependencies, light imports, no TensorFlow."""

import ast
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT


def test_requirements_and_metadata_agree():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith(("#", "-e"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert listed == project["dependencies"]
    assert "-e ." in lines


def imports_of(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in out.stdout.split()}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("automoe_jax.architecture.space", {"jax", "flax"}),
        ("automoe_jax.published.subnet_files", {"jax", "flax"}),
        ("automoe_jax.architecture.counts", {"jax", "flax"}),
        ("automoe_jax.latency.process", {"jax", "flax"}),
        ("automoe_jax.search.algorithms", {"jax", "flax"}),
        ("automoe_jax.cli.process", {"jax", "flax", "ml_collections"}),
        ("automoe_jax.cli.describe", {"jax", "flax"}),
        ("automoe_jax.cli.translate", {"flax", "ml_collections", "tensorflow_datasets", "yaml"}),
        ("automoe_jax.data.corpus", {"tensorflow_datasets", "grain", "jax"}),
        ("automoe_jax.data.tfds_pairs", {"tensorflow", "torch"}),
        ("automoe_jax.phases.pipeline", {"tensorflow", "torch"}),
    ],
)
def test_what_modules_pull_in(module, unwanted):
    assert not imports_of(module) & unwanted


def test_reading_a_config_needs_neither_jax_nor_tfds():
    code = """
import runpy, sys
from pathlib import Path
from automoe_jax.config import resolve
for path in Path("configs").glob("*.py"):
    config = runpy.run_path(str(path))
    if path.stem not in ("supertransformer", "systems"):  # these need a name
        resolve(config["get_config"]())
print(*sys.modules)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"jax", "flax", "tensorflow_datasets", "grain"} & set(out.stdout.split())


def test_programs_import_at_their_top():
    for path in (ROOT / "automoe_jax/cli").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                kinds = {type(node) for node in ast.walk(function)}
                assert not kinds & {ast.Import, ast.ImportFrom}, f"{path}: {function.name}"


def test_the_library_neither_prints_nor_reads_flags():
    wrong = []
    library = ROOT / "automoe_jax"
    for path in set(library.rglob("*.py")) - set((library / "cli").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                wrong.append(f"{path}:{node.lineno} prints")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("absl"):
                wrong.append(f"{path}:{node.lineno} reads flags")
    assert not wrong


def test_no_shared_data_is_in_the_project():
    for path in ROOT.rglob("*"):
        if ".git" in path.parts or ".venv" in path.parts or "runs" in path.parts:
            continue
        if path.is_file() and path.suffix in (".gz", ".npz", ".csv"):
            raise AssertionError(f"{path} looks like shared data")
