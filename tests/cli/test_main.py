"""The console command, and what comes with the project."""

import importlib
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from automoe_jax.cli import main, options
from automoe_jax.system import shipped
from automoe_jax.system.errors import UserError
from automoe_jax.system.version import __version__


def automoe(*arguments, cwd=None):
    program = "from automoe_jax.cli.main import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_every_command_is_listed_and_has_a_program():
    programs = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert programs == set(main.COMMANDS)
    text = main.help_text()
    for name in main.COMMANDS:
        assert (ROOT / "automoe_jax" / "cli" / f"{name}.py").exists()
        assert main.summary(name) in text
        assert main.summary(name)


def test_the_command_runs_commands(tmp_path):
    """Outside the clone, by the names of configs and architectures."""
    found = automoe("describe", "--subnet", "transformer_base", "--json", cwd=tmp_path)
    assert found.returncode == 0
    assert '"params": 44' in found.stdout
    found = automoe("describe", "--config=quickstart", cwd=tmp_path)
    assert "decoder_depths" in found.stdout
    found = automoe("configs", cwd=tmp_path)
    assert "multi30k" in found.stdout
    assert "44.14" in found.stdout
    assert automoe("--version").stdout.strip() == f"automoe_jax {__version__}"


def test_help_shows_commands_as_one_would_type_them(monkeypatch):
    command = importlib.import_module("automoe_jax.cli.train")
    monkeypatch.setattr(sys, "argv", ["automoe train"])
    installed = options.help_text(command)
    assert "automoe train --config wmt14 --subnet best_1.json --init_from runs/wmt14" in installed
    monkeypatch.setattr(sys, "argv", ["launch/train.py"])
    assert "python launch/train.py --config configs/wmt14.py" in options.help_text(command)


def test_help_says_what_every_field_of_a_config_is():
    text = options.help_text(importlib.import_module("automoe_jax.cli.train"))
    fields = re.findall(r"^  --config\.(\S+?)=.*\n((?:      .*\n?)*)", text, re.MULTILINE)
    assert len(fields) > 100
    assert [name for name, about in fields if not about.strip()] == []
    about = {name: " ".join(text.split()) for name, text in fields}
    assert about["search.constraint.params_m"].startswith("all parameters")
    # One of a base class, one of a comment, and one of two that are explained together.
    assert about["subnet_training.b1"] == about["training.b2"]
    assert about["training.buckets"] == "most batch shapes; each compiles once"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trein"], "automoe: 'trein' is not a command; did you mean train?"),
        (["train", "--config=quickstrat"], "did you mean quickstart? `automoe configs` lists"),
        (["describe", "--subnet", "nothing"], "neither a file nor a shipped architecture"),
        (["train"], "--config is missing"),
    ],
)
def test_mistakes_are_one_line(arguments, line, tmp_path):
    found = automoe(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert line in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_names_become_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shipped.FOLDER
    given = ["train.py", "--config", "quickstart", "--subnet=transformer_big", "--json"]
    expected = ["train.py", "--config", str(folder / "quickstart.py"),
                f"--subnet={folder / 'subnets' / 'transformer_big.json'}", "--json"]  # fmt: skip
    assert options.with_shipped(given) == expected
    assert shipped.config("configs/wmt14.py") == str(folder / "wmt14.py")
    assert shipped.config("systems:msdocs:hat") == f"{folder / 'systems.py'}:msdocs:hat"
    assert shipped.subnet("configs/subnets/transformer_big.json").startswith(str(folder))
    # A file of one's own goes first; one that is missing is named as it is given.
    (tmp_path / "quickstart").write_text("mine")
    assert shipped.config("quickstart") == "quickstart"
    assert shipped.config("other.py") == "other.py"
    assert shipped.config("elsewhere/wmt14") == "elsewhere/wmt14"
    # A folder is none: it may be a workdir of that name.
    (tmp_path / "multi30k").mkdir()
    assert shipped.config("multi30k") == str(folder / "multi30k.py")
    with pytest.raises(UserError, match="neither a file"):
        shipped.subnet("x" * 300)
    with pytest.raises(UserError, match="neither a file nor a shipped config"):
        shipped.config("other")


def test_names_are_unique():
    for paths in (shipped.configs(), shipped.subnets()):
        stems = [path.stem for path in paths]
        assert len(set(stems)) == len(stems) > 5


def test_all_packages_are_installed():
    """pyproject.toml lists the packages, since `configs/` becomes one of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    code = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "automoe_jax").rglob("__init__.py")
    }
    configs = {
        "automoe_jax." + str(path.parent.relative_to(ROOT)).replace("/", ".")
        for pattern in ("*.py", "*.json")
        for path in (ROOT / "configs").rglob(pattern)
    }
    assert listed == code | configs


def test_a_closed_pipe_is_no_error():
    """`automoe help | head -1`; and the package is the same command."""
    command = f"{sys.executable} -m automoe_jax help | head -1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert found.stdout.startswith("automoe COMMAND")
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr
