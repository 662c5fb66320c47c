"""The project's own promises: one list of dependencies, light imports, no TensorFlow."""

import ast
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))


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
        if {".git", ".venv", "runs", "site", "dist", "build"} & set(path.parts):
            continue
        if path.is_file() and path.suffix in (".gz", ".npz", ".csv"):
            raise AssertionError(f"{path} looks like shared data")


@pytest.mark.parametrize("program", ["make_reference.py", "make_results.py"])
def test_pages_are_what_code_and_results_say(program):
    program = [sys.executable, f"docs/{program}", "--check"]
    found = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not found.returncode, found.stderr


def test_the_slurm_example_is_well_formed():
    script = ROOT / "launch/slurm/train.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert len(options) == text.count("#SBATCH")
    assert set(options) == {
        "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal",
        "requeue",
    }  # fmt: skip
    # JAX takes one GPU for each process.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "launch/train.py" in text


def test_sbatch_reads_the_slurm_example(tmp_path, monkeypatch):
    """It takes all options, and only then looks for a cluster."""
    if shutil.which("sbatch") is None:
        pytest.skip("sbatch (Debian: slurm-client) is not installed")
    config = tmp_path / "slurm.conf"
    cluster = "ClusterName=none", "SlurmctldHost=localhost", "AuthType=auth/none", "GresTypes=gpu"
    config.write_text("\n".join([*cluster, ""]))
    monkeypatch.setenv("SLURM_CONF", os.environ.get("SLURM_CONF", str(config)))
    program = ["sbatch", "--test-only", ROOT / "launch/slurm/train.sh"]
    found = subprocess.run(program, capture_output=True, text=True, check=False)
    assert "Unable to contact slurm controller" in found.stderr, found.stderr


@pytest.fixture
def job_set():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifest")
    return yaml.safe_load((ROOT / "launch/k8s/jobset.yaml").read_text())


def test_the_kubernetes_example_is_well_formed(job_set):
    one = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    # Fields of another name would be ignored.
    assert job_set == {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "automoe"},
        "spec": {
            "failurePolicy": {"maxRestarts": 20},
            "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": {"spec": one}}],
        },
    }  # fmt: skip
    pod = one["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] + container["args"][-1:] == ["automoe", "train", "--distributed"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert one["parallelism"] == one["completions"]
    assert one["parallelism"] * chips == math.prod(map(int, shape.split("x")))
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert any(arg.startswith("--workdir=/runs") for arg in container["args"])


def test_the_kubernetes_example_has_a_job_by_its_schema(job_set):
    """The Job inside; each field has a name and a type that Kubernetes knows."""
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate, with Kubernetes's schemas, is missing"
    )
    (hosts,) = job_set["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hosts"}}
    validate.validate(job | hosts["template"], validate.latest_version(), strict=True)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in DOCS)]
)
def test_links_lead_somewhere(page):
    """To files of the project, and to headings of its pages."""
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            lines = linked.read_text(encoding="utf-8").splitlines()
            headings = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
            slugs = [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page}: {target}"


def test_names_in_the_docs_are_files():
    """Programs, configs and benchmarks that the docs name exist."""
    names = r"\b(?:launch|configs|benchmarks|tests|docs)/[\w/.-]+\.(?:py|json|jsonl|md)\b"
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]:
        for name in re.findall(names, path.read_text(encoding="utf-8")):
            # Capitals stand for a name: launch/X.py.
            named = name if Path(name).stem.islower() else Path(name).parent
            assert (ROOT / named).exists(), f"{path.name}: {name}"
