"""Every command of README.md, run in its order in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from automoe_jax.data.phrase_values import SPLITS

pytestmark = pytest.mark.slow

# What is not run, and where it is.
ELSEWHERE = {
    "make lint": "by continuous integration",
    "make test": "by continuous integration",
    "make test-slow": "it is this test, among others",
    "make docs site": "by test_project: the reference is not stale",
    "--distributed": "needs a pod; test_slow runs two processes",
}
# So that a text of 400 lines and minutes are enough.
SMALL = (
    "--config.tokenizer.vocab_size=500 --config.training.steps=20 --config.training.warmup_steps=5 "
    "--config.subnet_training.steps=20 --config.subnet_training.warmup_steps=5 "
    "--config.search.population=6 --config.search.parents=2 --config.search.iterations=1 "
    "--config.search.mutations=2 --config.search.crossovers=2 --config.latency.runs=20 "
    "--config.search.latency_runs=20 --config.search.measurements=12 --config.search.keep=2 "
    "--config.predictor.subnets=20 --config.predictor.held_out=6"
)


def commands(text: str) -> list[tuple[str, str]]:
    """Commands of indented blocks ("sh"), one an entry, and fenced pieces ("python"), in order."""
    found = []
    pattern = r"^```python\n((?:.*\n)*?)```|^    ((?:.*\\\n)*.*)"
    for match in re.finditer(pattern, text, re.MULTILINE):
        python, line = match.groups()
        command = (line or "").replace("\\\n", " ").partition("  #")[0].strip()
        if python:
            found.append(("python", python))
        elif re.match(r"(make|echo|automoe|python|pip|source) ", command):
            found.append(("sh", command))
    return found


@pytest.fixture
def copy(tmp_path) -> Path:
    """The project's files as git has them, and a small text."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listed.returncode:
        pytest.skip("needs git's list of the project's files")
    for name in filter(None, listed.stdout.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = tmp_path / "DIR"
    text.mkdir()
    for split in SPLITS:
        lines = [f"the {i} red {'cat' if i % 2 else 'dog'} of {split}" for i in range(400)]
        (text / f"{split}.en").write_text("\n".join(lines) + "\n")
        (text / f"{split}.de").write_text("\n".join(lines).replace("the", "die") + "\n")
    (tmp_path / "new.en").write_text("the red cat\n")
    return tmp_path


def test_commands_do_what_they_say(copy):
    found = commands((ROOT / "README.md").read_text())
    assert len(found) > 10
    # The first command, `make quickstart`, makes the environment: an editable install of the copy
    # must not replace that of the environment that runs this test.
    environment = copy / ".venv"
    env = {**os.environ, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    for name in ("XLA_FLAGS", "PYTHONPATH", "VIRTUAL_ENV"):
        env.pop(name, None)
    for kind, command in found:
        if kind == "python":
            call = [str(environment / "bin" / "python"), "-c", command]
        elif command.startswith("source ") or any(name in command for name in ELSEWHERE):
            continue
        else:
            line = command.replace("pip install -r", "pip install -q -r")
            if line.startswith("make "):
                line += f" PYTHON={sys.executable}"
            if "--workdir runs/mine" in line:
                line += f" {SMALL}"
            call = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(call, cwd=copy, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if "translate" in command or kind == "python":
            where = copy / "new.de" if "new.de" in command else None
            assert (where.read_text() if where else done.stdout).strip(), command
    assert (copy / "runs/quickstart/report/index.html").exists()
