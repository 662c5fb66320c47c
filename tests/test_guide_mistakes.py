"""The guide walked with mistakes: each ends in one line, and the next step works after it.

Others are walked elsewhere: full disks, interrupts and closed pipes in `cli/test_survival.py`, a
machine without a compiler in `decoding`, names of commands and configs in `cli/test_main.py`.
"""

import gzip
from pathlib import Path

import pytest
from conftest import shipped_config
from programs import launch

from automoe_jax.published import subnet_files

pytestmark = pytest.mark.slow

SMALL = (
    "--config.tokenizer.vocab_size=400", "--config.training.steps=4", "--config.training.buckets=1",
    "--config.training.warmup_steps=1", "--config.subnet_training.steps=4",
    "--config.subnet_training.warmup_steps=1", "--config.subnet_training.buckets=1",
    "--config.export.beam_sizes=1,",
)  # fmt: skip
CONFIG = ["--config", "configs/multi30k.py", *SMALL]


def corpus(folder: Path, lines: int = 300, **changed: bytes | None) -> Path:
    """A small text in English and German; `train_de=None` leaves a file out."""
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        words = [f"the {i} red {'cat' if i % 2 else 'dog'} of {split}" for i in range(lines)]
        for lang, text in (("en", words), ("de", [w.replace("the", "die") for w in words])):
            content = changed.get(f"{split}_{lang}", "\n".join([*text, ""]).encode())
            if content is not None:
                (folder / f"{split}.{lang}").write_bytes(content)
    return folder


def mistake(program: str, *args: str, stdin: bytes = b"") -> str:
    """The last line of a program that fails; notes of its progress may come before it."""
    done = launch(program, *args, stdin=stdin)
    error = done.stderr.decode()
    assert done.returncode == 2, error
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def works(program: str, *args: str, stdin: bytes = b"") -> bytes:
    done = launch(program, *args, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[str], Path]:
    """Flags of a run whose supernet is trained, and an export of its smallest subnet."""
    folder = tmp_path_factory.mktemp("guide")
    flags = [*CONFIG, f"--config.data.path={corpus(folder / 'text')}"]
    flags.append(f"--workdir={folder / 'run'}")
    works("train", *flags)
    subnet_files.save(shipped_config("multi30k").space.smallest(), folder / "smallest.json")
    works("export", *flags, f"--subnet={folder / 'smallest.json'}", f"--out={folder / 'export'}")
    return flags, folder


def test_the_text(tmp_path):
    """Step 2. The workdir of the mistakes takes the right text in the end."""
    here = [*CONFIG, f"--workdir={tmp_path / 'run'}"]

    def refuses(words: str, folder: Path, *flags: str):
        assert words in mistake("prepare", *here, f"--config.data.path={folder}", *flags)

    refuses("does not exist; data.path must hold", tmp_path / "nowhere")
    refuses("has no train.de", corpus(tmp_path / "missing", train_de=None))
    refuses("has no train.fr", corpus(tmp_path / "french"), "--config.data.source_lang=fr")
    refuses("has 300 lines but", corpus(tmp_path / "uneven", train_de=b"eins\nzwei\n"))
    refuses("line 1 has a zero byte", corpus(tmp_path / "zeros", train_en=b"a\0b\n" * 300))
    refuses("is empty", corpus(tmp_path / "nothing", valid_en=b"", valid_de=b""))
    torn = corpus(tmp_path / "torn", train_en=None)
    (torn / "train.en.gz").write_bytes(gzip.compress(b"the cat\n" * 300)[:-20])
    refuses("is not a whole gzip file", torn)
    short = corpus(tmp_path / "short", 50)
    refuses("tokenizer.vocab_size", short, "--config.tokenizer.vocab_size=4000")
    two_files = dict.fromkeys(("valid_en", "valid_de", "test_en", "test_de"))
    good = corpus(tmp_path / "good", **two_files)
    done = launch("prepare", *here, f"--config.data.path={good}")
    assert done.returncode == 0, done.stderr.decode()
    assert b"train 270, valid 15, test 15 pairs (valid and test taken" in done.stderr


def test_all_of_it(run, tmp_path):
    """Step 3: settings that cannot work are told before anything is trained."""
    flags, folder = run
    none = "--config.search.constraint.latency_ratio=0"
    new = [*flags[:-1], f"--workdir={tmp_path / 'new'}"]
    assert "no limit for the search" in mistake("pipeline", *new, none)
    tight = "--config.search.constraint.gflops=1e-6"
    assert "no subnet can meet gflops" in mistake("pipeline", *new, none, tight)
    assert "latency_ratio is 5" in mistake(
        "pipeline", *new, "--config.search.constraint.latency_ratio=5"
    )
    assert "threads is 999" in mistake("pipeline", *new, "--config.latency.threads=999")
    assert "did you mean --config.training.steps?" in mistake(
        "train", *flags, "--config.training.step=5"
    )
    assert "was made with another config: tokenizer.vocab_size" in mistake(
        "train", *flags, "--config.tokenizer.vocab_size=300"
    )
    assert "is of kind export, not run" in mistake(
        "train", *flags[:-1], f"--workdir={folder / 'export'}"
    )
    assert "is not a run" in mistake("search", *flags[:-1], f"--workdir={tmp_path / 'other'}")
    works("train", *flags)


def test_translating(run, tmp_path):
    """Step 4."""
    _, folder = run
    export = f"--export={folder / 'export'}"
    assert "does not exist" in mistake("translate", f"--export={tmp_path}/none", stdin=b"a\n")
    assert "--config.export.beam_sizes=1,7" in mistake(
        "translate", export, "--beam_size=7", stdin=b"a\n"
    )
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"the cat\n"))
    assert "is compressed" in mistake("translate", export, f"--input={tmp_path / 'a.gz'}")
    assert "cannot be read" in mistake("translate", export, f"--input={tmp_path / 'none.en'}")
    (tmp_path / "a.en").write_bytes(b"the red cat\n")
    same = f"--output={tmp_path / 'a.en'}"
    assert "is the input" in mistake("translate", export, f"--input={tmp_path / 'a.en'}", same)
    assert works("translate", export, stdin=b"the red cat\n").count(b"\n") == 1
