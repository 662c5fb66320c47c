"""The programs: mistakes get one line and exit code 2, and describe counts what it should."""

import gzip
import json
import os
from pathlib import Path

import pytest
from conftest import shipped_config
from programs import launch, mistake

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.published import subnet_files
from automoe_jax.system import locks

QUICK = ["--config", "configs/quickstart.py"]


def text_run(tmp_path: Path) -> list[str]:
    """Flags of a tiny run on a folder of text that is in order."""
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    for split, lang in (("train", "en"), ("train", "de"), ("valid", "en"), ("valid", "de")):
        (folder / f"{split}.{lang}").write_text("ein zwei drei\nvier fünf\n" * 20)
    return [
        *QUICK, "--workdir", str(tmp_path / "run"), "--config.data.kind=parallel_text",
        f"--config.data.path={folder}", "--config.tokenizer.vocab_size=30",
    ]  # fmt: skip


def test_missing_corpus_folder(tmp_path):
    flags = text_run(tmp_path)
    line = mistake("train", *flags, f"--config.data.path={tmp_path}/none")
    assert "none does not exist; data.path must hold train.en" in line
    assert launch("prepare", *flags).returncode == 0  # put right, the same workdir serves


def test_misspelt_config_field(tmp_path):
    line = mistake("train", *QUICK, "--config.training.stpes=3")
    assert "--config.training.stpes is not a field" in line
    assert "did you mean --config.training.steps?" in line
    assert "invalid literal for int" in mistake("train", *QUICK, "--config.training.steps=many")
    assert "Unknown command line flag 'confg'" in mistake("train", "--confg", "x")
    assert "--config is missing" in mistake("train")
    assert "none.py" in mistake("train", "--config", "configs/none.py")
    line = mistake("train", *QUICK, "--config.training.label_smoothing=1.5")
    assert "training.label_smoothing is 1.5" in line


def test_subnet_outside_its_space(tmp_path):
    path = tmp_path / "subnet.json"
    subnet_files.save(SearchSpace().largest(), path)
    line = mistake("train", *QUICK, "--subnet", str(path), "--workdir", str(tmp_path / "run"))
    assert "qkv_dim is 512; the space allows 128" in line
    assert not (tmp_path / "run").exists()


def test_source_that_is_not_text(tmp_path):
    flags = text_run(tmp_path)
    (tmp_path / "text" / "train.en").write_bytes(bytes(range(256)) * 10)
    assert "train.en is not text: line 1 has a zero byte" in mistake("train", *flags)
    (tmp_path / "text" / "train.en.gz").write_bytes(gzip.compress(b"one line\n"))
    (tmp_path / "text" / "train.en").unlink()
    assert "has 1 lines but" in mistake("train", *flags)


def test_workdir_of_another_config(tmp_path):
    flags = text_run(tmp_path)
    assert launch("prepare", *flags).returncode == 0
    line = mistake("train", *flags, "--config.data.max_length=63")
    assert "was made with another config: data.max_length is 64 there and 63 here" in line
    line = mistake("train", *flags, "--config.tokenizer.vocab_size=31")
    assert "tokenizer.vocab_size is 30 there and 31 here" in line


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    line = mistake("train", *QUICK, "--workdir", str(tmp_path / "x"))
    assert "x is a file, not a folder" in line
    line = mistake("pipeline", *QUICK, "--workdir", str(tmp_path / "x" / "run"))
    assert "x is a file, not a folder" in line


def test_a_workdir_in_use(tmp_path):
    locks.hold(tmp_path / "run")
    line = mistake("prepare", *text_run(tmp_path))
    assert f"run is in use by process {os.getpid()} on" in line
    assert "wait until it ends" in line
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_impossible_limits(tmp_path):
    flags = text_run(tmp_path)
    common = [*flags, "--random_weights", "--config.search.constraint.latency_ratio=0"]
    result = launch("search", *common, "--config.search.constraint.gflops=1e-6")
    assert result.returncode == 2
    line = result.stderr.decode().strip().splitlines()[-1]
    assert "no subnet can meet gflops <= 1e-06: the smallest one has" in line
    result = launch(
        "search", *common, "--config.search.constraint.latency_ms=0.001",
        "--config.search.latency_runs=3",
    )  # fmt: skip
    assert result.returncode == 2
    line = result.stderr.decode().strip().splitlines()[-1]
    assert "no subnet can meet latency_ms <= 0.001: the smallest one has" in line
    # The machine may have been busy.
    assert "the same command measures again" in line
    assert not list((tmp_path / "run").rglob("measurements.jsonl"))
    assert "Traceback" not in result.stderr.decode()


@pytest.mark.parametrize(
    ("program", "change", "words"),
    [
        (
            "search",
            "search.constraint.latency_ms=nan",
            "config.search.constraint.latency_ms is nan",
        ),
        ("search", "search.latency=guess", "config.search.latency is 'guess'; allowed: verified"),
        ("train", "training.peak_rate=-1", "config.training.peak_rate is -1.0"),
        ("train", "subnet_training.log_every=0", "config.subnet_training.log_every is 0"),
        ("export", "export.beam_sizes=a,b", "config.export.beam_sizes"),
        ("export", "export.platforms=cpu,abacus", "allowed: cpu, cuda, rocm, tpu"),
    ],
)
def test_wrong_values_are_named_by_their_field(program, change, words):
    assert words in mistake(program, *QUICK, f"--config.{change}")


def test_random_weights_have_no_shortlist(tmp_path):
    subnet = tmp_path / "subnet.json"
    subnet_files.save(shipped_config("quickstart").space.smallest(), subnet)
    flags = [*QUICK, "--random_weights", f"--subnet={subnet}", f"--out={tmp_path / 'export'}"]
    line = mistake("export", *flags, "--shortlist=50")
    assert "--shortlist is 50, which is counted in a run's training text" in line


def test_config_that_is_none(tmp_path):
    assert "cannot be read" in mistake("train", "--config", "README.md")
    (tmp_path / "c.py").write_text("def get_config():\n    return 3\n")
    assert "--config" in mistake("train", "--config", str(tmp_path / "c.py"))


def test_searching_before_training(tmp_path):
    flags = text_run(tmp_path)
    assert "is not a run; train one with launch/train.py" in mistake("search", *flags)
    assert launch("prepare", *flags).returncode == 0
    result = launch("search", *flags)
    assert result.returncode == 2
    assert b"has no checkpoint; train it first" in result.stderr


def test_names_that_are_mistyped_make_no_run(tmp_path):
    nowhere = "--workdir", str(tmp_path / "nowhere")
    for program in ("rank", "routing", "export"):
        assert "nowhere is not a run" in mistake(program, *QUICK, *nowhere)
    assert "nowhere does not exist" in mistake("sensitivity", *nowhere)
    assert not (tmp_path / "nowhere").exists()
    assert "data.path is empty; give --config.data.path" in mistake(
        "prepare", *QUICK, *nowhere, "--config.data.kind=parallel_text"
    )
    flags = text_run(tmp_path)
    assert "--workdir is the folder of the corpus" in mistake(
        "prepare", *flags, "--workdir", str(tmp_path / "text")
    )


def test_flags_that_would_do_nothing():
    one = "--candidates=configs/subnets/transformer_base.json"
    assert "--subnets has no effect beside --candidates" in mistake(
        "halving", *QUICK, one, "--subnets=5"
    )
    assert "--subnets is 1; give at least 4, or name" in mistake("halving", *QUICK, "--subnets=1")
    assert "--out names the folder of a subnet" in mistake("train", *QUICK, "--out=x")
    files = "--source=a", "--reference=b"
    assert "--split has no effect beside --source" in mistake(
        "evaluate", "--export=x", *files, "--split=valid"
    )
    assert "--seed is of a table's split" in mistake("fit_latency", *QUICK, "--seed=1")


def test_search_and_ranking_mistakes(tmp_path):
    assert "--seeds has 'a'; give integers" in mistake("search", *QUICK, "--seeds=1,a")
    assert "--subnets is 2; give at least 4" in mistake("rank", *QUICK, "--subnets=2")
    assert "--bleu is -1; give a number of sentences" in mistake("rank", *QUICK, "--bleu=-1")
    outside = mistake("rank", *QUICK, "--trained_in=../a")
    assert "--trained_in is '../a'; give the name of a folder" in outside
    assert "--out is '../a'; give the name of a folder" in mistake("search", *QUICK, "--out=../a")
    one = "--candidates=configs/subnets/transformer_base.json"
    assert "--candidates names fewer than 2" in mistake("halving", *QUICK, one)
    assert "none.json" in mistake("routing", *QUICK, "--subnet=none.json")
    assert "--vocab_size is 300; it goes with --random_weights" in mistake(
        "fit_latency", *QUICK, "--vocab_size=300"
    )
    assert "--out is missing" in mistake("fit_latency", "--table=none.csv")
    assert "none.csv does not exist" in mistake(
        "fit_latency", f"--table={tmp_path}/none.csv", f"--out={tmp_path}/m.json"
    )
    assert not (tmp_path / "m.json").exists()


def test_export_and_translation_mistakes(tmp_path):
    assert "--export is missing" in mistake("translate")
    assert "does not exist" in mistake("translate", f"--export={tmp_path}/none", stdin=b"a\n")
    assert "does not exist" in mistake("benchmark", f"--export={tmp_path}/none")
    assert "either --workdir, or --source" in mistake("evaluate", "--export=x", "--source=a")
    files = "--source=a", "--reference=b"
    assert "b is read here" in mistake("evaluate", "--export=x", *files, "--output=./b")
    assert "unexpected argument 'x'" in mistake("describe", "x")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a\n"))
    packed = mistake("translate", "--export=x", f"--input={tmp_path}/a.gz")
    assert "is compressed; give its text, as from: zcat" in packed
    for text in ('{"version": ' + "1" * 5000 + "}", "[" * 200_000):
        (tmp_path / "bad.json").write_text(text)
        assert "is not JSON" in mistake("describe", f"--subnet={tmp_path}/bad.json")


def test_describe(tmp_path, shared):
    models = json.loads((shared / "published/hat_wmt14_ende.json").read_text())["models"]
    model = models["HAT_wmt14ende_xeon@450.9ms_bleu@28.5"]
    path = tmp_path / "hat.json"
    path.write_text(json.dumps(model["subnet"]))
    result = launch("describe", f"--subnet={path}", "--json", "--config", "configs/wmt14.py")
    counts = json.loads(result.stdout)
    assert round(counts["params"] / 1e6, 2) == 56.73
    assert round(counts["flops"] / 1e9, 2) == 3.53
    assert {"active_params", "sparsity", "sparsity_supernet", "layers"} <= counts.keys()
    shorter = json.loads(
        launch("describe", f"--subnet={path}", "--json", "--sentence_length=10").stdout
    )
    assert shorter["flops"] < counts["flops"] / 2.9
    table = launch("describe", f"--subnet={path}").stdout.decode()
    assert "decoder.5" in table
    assert "3.5319 G" in table


@pytest.mark.parametrize(
    "program",
    [
        "prepare",
        "train",
        "fit_latency",
        "search",
        "rank",
        "sensitivity",
        "routing",
        "halving",
        "distill",
        "export",
        "benchmark",
        "translate",
        "evaluate",
        "describe",
        "pipeline",
        "report",
        "demo",
    ],
)
def test_help(program):
    result = launch(program, "--help")
    assert f"launch/{program}.py" in result.stdout.decode()
