"""Programs: compiled ahead in threads, kept in files, waited for."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from automoe_jax.system import compile_cache, programs
from automoe_jax.system.programs import Programs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A compilation cache of this test alone, also for what compiles at once."""
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in settings}
    monkeypatch.setattr(compile_cache, "MIN_COMPILE_SECONDS", 0)
    compile_cache.enable(tmp_path, environment=False)
    reset_cache()
    found = compile_cache.folder()
    assert found is not None
    yield found / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


class Traced:
    """A mapped function that counts how often it is traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, x, n):
        self.count += 1
        return jax.lax.fori_loop(0, n, lambda i, y: jnp.sort(y @ y.T / 8 + i, axis=0), x).sum()


def arguments(size: int):
    x = np.random.default_rng(0).normal(size=(jax.local_device_count(), size, size))
    return x.astype(np.float32), np.int32(3)


def made(about: str = "test") -> tuple[Programs, Traced]:
    traced = Traced()
    return Programs(jax.pmap(traced, in_axes=(0, None)), about), traced


@pytest.mark.usefixtures("folder")
def test_each_shape_has_its_program():
    found, traced = made()
    for size in (4, 8, 4):
        found.schedule(size, arguments(size))
    for size in (8, 4):
        expected = jax.pmap(Traced(), in_axes=(0, None))(*arguments(size))
        np.testing.assert_array_equal(found.get(size)(*arguments(size)), expected)
    assert found.state() == (2, 2)
    assert traced.count == 2


def test_kept_programs_are_loaded_and_not_traced(folder):
    found, _ = made()
    found.schedule(4, arguments(4))
    expected = np.asarray(found.get(4)(*arguments(4)))
    path = written(folder)
    again, traced = made()
    again.schedule(4, arguments(4))
    np.testing.assert_array_equal(again.get(4)(*arguments(4)), expected)
    assert traced.count == 0
    other, traced = made("something else")
    other.schedule(4, arguments(4))
    np.testing.assert_array_equal(other.get(4)(*arguments(4)), expected)
    assert traced.count == 1
    # JAX's cache had it already: XLA would leave out some of its code.
    assert [path] == list(folder.iterdir())


def written(folder):
    """The one file, which is written after the program is there."""
    programs._pool.finish()
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("damage", [b"", b"no program", None])
def test_a_damaged_file_is_compiled_again(folder, damage):
    found, _ = made()
    found.schedule(4, arguments(4))
    expected = np.asarray(found.get(4)(*arguments(4)))
    path = written(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage is None else damage)
    again, traced = made()
    again.schedule(4, arguments(4))
    np.testing.assert_array_equal(again.get(4)(*arguments(4)), expected)
    assert traced.count == 1


class Slow:
    """Stands for a mapped function that is compiled when the test says so."""

    def __init__(self):
        self.started, self.go = threading.Event(), threading.Event()
        self.begun: list[int] = []

    def lower(self, size):
        self.begun.append(size.shape[0])
        self.started.set()
        assert self.go.wait(60)
        if size.shape[0] == 13:
            raise ValueError("no luck")
        return self

    def compile(self):
        return self


def scheduled(monkeypatch, *sizes):
    """Programs of these sizes, one compiled at a time, and what they are of."""
    monkeypatch.setattr(programs, "MOST_THREADS", 1)
    slow = Slow()
    found = Programs(slow, "slow")
    for size in sizes:
        found.schedule(size, (np.zeros(size),))
    return slow, found


@pytest.mark.usefixtures("folder")
def test_waiting_can_be_given_up_and_the_wanted_come_first(monkeypatch):
    slow, found = scheduled(monkeypatch, 1, 2, 3, 13)
    assert slow.started.wait(60)
    assert found.get(3, stop=lambda: True) is None  # and is the next one from here on
    assert programs.compiling()
    slow.go.set()
    assert found.get(3) is slow
    with pytest.raises(ValueError, match="no luck"):
        found.get(13)
    assert found.get(2) is slow
    assert slow.begun in ([1, 3, 13, 2], [1, 3, 2, 13])


@pytest.mark.usefixtures("folder")
def test_who_times_something_can_wait_for_all(monkeypatch):
    slow, found = scheduled(monkeypatch, 1, 2)
    waiting = threading.Thread(target=programs.wait)
    waiting.start()
    assert slow.started.wait(60)
    found.schedule(3, (np.zeros(3),))
    waiting.join(0.05)
    assert waiting.is_alive()
    slow.go.set()
    waiting.join(60)
    assert not waiting.is_alive()
    assert found.state() == (3, 3)
    assert not programs.compiling()


@pytest.mark.usefixtures("folder")
def test_cancelled_programs_are_not_compiled(monkeypatch):
    slow, found = scheduled(monkeypatch, 1, 2)
    assert slow.started.wait(60)
    found.cancel()
    slow.go.set()
    programs._pool.finish()
    assert slow.begun == [1]
    assert not programs.compiling()


def test_a_cache_that_the_environment_names(tmp_path, monkeypatch):
    """It is for all runs; a child of a program that has one takes the same folder."""
    used = []
    monkeypatch.setattr(compile_cache, "enable", used.append)
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    compile_cache.enable_for_run(tmp_path / "run")
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "all"))
    compile_cache.enable_for_run(tmp_path / "run")
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "all" / compile_cache.machine()))
    compile_cache.enable_for_run(tmp_path / "run")
    assert used == [tmp_path / "run", tmp_path / "all", tmp_path / "all"]
