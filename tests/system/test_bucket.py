"""A workdir in a bucket: what a copy sends and fetches, and what a kill leaves."""

import json
import shutil
import uuid

import fsspec
import pytest

from automoe_jax.system import bucket, locks
from automoe_jax.system.bucket import INDEX, Bucket
from automoe_jax.system.errors import UserError


@pytest.fixture
def two(tmp_path):
    """Copies of one bucket in memory, on two machines."""
    url = f"memory://{uuid.uuid4().hex}/run"
    return Bucket(url, tmp_path / "a"), Bucket(url, tmp_path / "b")


def write(own: Bucket, name: str, text: str):
    path = own.copy / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def content(own: Bucket) -> dict[str, str]:
    ours = (INDEX, locks.LOCK)
    paths = (path for path in own.copy.rglob("*") if path.is_file() and path.name not in ours)
    return {str(path.relative_to(own.copy)): path.read_text() for path in paths}


def test_one_machine_goes_on_where_another_was(two):
    a, b = two
    a.pull()  # there is nothing yet
    write(a, "manifest.json", "{}")
    write(a, "supernet/checkpoints/4/params/x", "x" * (bucket.AT_ONCE + 1))
    a.push()
    b.pull()
    assert content(b) == content(a)
    write(b, "supernet/checkpoints/8/params/x", "y")
    write(b, "supernet/metrics.jsonl", "1\n")
    shutil.rmtree(b.copy / "supernet/checkpoints/4")
    b.push()
    a.pull()
    assert content(a) == content(b)
    assert not (a.copy / "supernet/checkpoints/4").exists()
    fs, root = fsspec.core.url_to_fs(a.url)
    assert not [path for path in fs.find(root) if "/4/" in path]


def test_only_what_changed_is_sent_and_fetched(two, monkeypatch):
    a, b = two
    for name in "xy":
        write(a, name, name)
    a.push()
    b.pull()
    moved = []
    monkeypatch.setattr(Bucket, "_send", lambda self, fs, to, name, entry: moved.append(name))
    monkeypatch.setattr(Bucket, "_fetch", lambda self, fs, to, name, entry: moved.append(name))
    a.push()
    b.pull()
    assert moved == []
    write(a, "y", "longer")
    a.push()
    assert moved == ["y"]


def test_what_is_unfinished_or_of_one_machine_stays_there(two):
    a, b = two
    for name in (
        ".lock", ".jax_cache/program", "tokens/.train.tmp/ids.npy", ".results.json.12.tmp",
        "supernet/checkpoints/4.orbax-checkpoint-tmp/params/x", "kept",
    ):  # fmt: skip
        write(a, name, "1")
    write(b, "own", "2")
    a.push()
    b.pull()
    assert content(b) == {"kept": "1", "own": "2"}


def test_a_push_that_was_killed_leaves_the_workdir_before_it(two, monkeypatch):
    a, b = two
    write(a, "1/x", "old")
    a.push()
    shutil.rmtree(a.copy / "1")
    for name in ("2/x", "2/y", "2/z"):
        write(a, name, "new")
    send = Bucket._send

    def killed(self, fs, to, name, entry):
        if name == "2/y":
            raise KeyboardInterrupt
        send(self, fs, to, name, entry)

    monkeypatch.setattr(Bucket, "_send", killed)
    with pytest.raises(KeyboardInterrupt):
        a.push()
    b.pull()
    assert content(b) == {"1/x": "old"}
    monkeypatch.undo()
    a.push()
    b.pull()
    assert content(b) == {"2/x": "new", "2/y": "new", "2/z": "new"}


def test_a_file_that_grows_meanwhile_is_sent_again(two, monkeypatch):
    a, b = two
    write(a, "metrics.jsonl", "1\n")
    here = Bucket._here

    def grows(self):
        found = here(self)
        with (self.copy / "metrics.jsonl").open("a") as f:
            f.write("2\n")
        return found

    monkeypatch.setattr(Bucket, "_here", grows)
    a.push()
    monkeypatch.undo()
    a.push()
    b.pull()
    assert content(b) == {"metrics.jsonl": "1\n2\n"}


def test_it_is_pushed_while_a_program_runs_and_at_its_end(two, monkeypatch):
    a, b = two
    monkeypatch.setattr(bucket, "PUSH_SECONDS", 0.02)

    def program():
        with a.kept(pytest.fail):
            write(a, "early", "1")
            while "early" not in content(b):
                b.pull()
            write(a, "late", "2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program()
    b.pull()
    assert content(b) == {"early": "1", "late": "2"}


def test_what_changed_here_is_newer_than_the_bucket(two):
    """After a kill, before a push: neither set back nor fetched again."""
    a, b = two
    for name in ("metrics.jsonl", "4/x"):
        write(a, name, "1")
    a.push()
    b.pull()
    write(a, "metrics.jsonl", "12")
    shutil.rmtree(a.copy / "4")
    write(a, "8/x", "2")
    a.pull()
    assert content(a) == {"metrics.jsonl": "12", "8/x": "2"}
    a.pull(exact=True)  # as other processes of a pod do
    assert content(a) == content(b)


def test_some_files_are_fetched(two):
    a, b = two
    for name in ("metrics.jsonl", "4/x"):
        write(a, name, "1")
    a.push()
    b.pull(only=lambda name: name == "metrics.jsonl")
    assert content(b) == {"metrics.jsonl": "1"}
    b.pull()
    assert content(b) == content(a)


def test_a_bucket_that_is_gone_takes_nothing_with_it(two):
    a, _ = two
    write(a, "x", "1")
    a.push()
    fs, root = fsspec.core.url_to_fs(a.url)
    fs.rm(root, recursive=True)
    with pytest.raises(UserError, match=f"is gone; its copy is {a.copy}: move it away"):
        a.pull()
    assert content(a) == {"x": "1"}


def test_a_checkpoint_that_is_removed_meanwhile_is_not_half_there(two, monkeypatch):
    a, b = two
    for name in ("4/x", "4/y"):
        write(a, name, "old")
    send = Bucket._send

    def removes(self, fs, to, name, entry):
        if name == "4/y":
            shutil.rmtree(self.copy / "4")
            write(self, "8/x", "new")
        send(self, fs, to, name, entry)

    monkeypatch.setattr(Bucket, "_send", removes)
    a.push()
    b.pull()
    assert content(b) == {"8/x": "new"}
    fs, root = fsspec.core.url_to_fs(a.url)
    assert not [path for path in fs.find(root) if "/4/" in path]


def test_a_copy_in_use_is_read_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"memory://{uuid.uuid4().hex}/run"
    own, other = Bucket.of(url), Bucket(url, tmp_path / "other")
    write(own, "x", "1")
    own.push()
    other.pull()
    write(other, "x", "other")
    other.push()
    with locks.held_if_free(own.copy) as free:
        assert free
        assert bucket.folder_of(url) == own.copy
        assert content(own)["x"] == "1"
    bucket.folder_of(url)
    assert content(own)["x"] == "other"
    assert Bucket.of(url, process=1).copy != own.copy


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"nosuch://x/run: .*give a folder, or a URL as gs://"):
        Bucket.of("nosuch://x/run").pull()
    (tmp_path / "file").write_text("")
    closed = Bucket.of(f"file://{tmp_path}/file/run")
    write(closed, "x", "1")
    with pytest.raises(UserError, match=f"cannot be written to; the copy is {closed.copy}"):
        closed.push()
    monkeypatch.setattr(fsspec.core, "url_to_fs", _no_package)
    with pytest.raises(UserError, match=r"pip install 'automoe_jax\[gcs\]'"):
        Bucket.of("gs://b/run").pull()


def _no_package(url, **options):
    raise ImportError("gcsfs")


def test_the_index_is_json_of_sizes(two):
    a, _ = two
    write(a, "x", "abc")
    a.push()
    fs, root = fsspec.core.url_to_fs(a.url)
    stored = json.loads(fs.cat_file(f"{root}/{INDEX}"))
    assert stored["version"] == 1
    assert stored["files"]["x"][0] == 3
