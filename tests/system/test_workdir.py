"""Manifests of folders."""

import pytest

from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError


def settings(steps: int, final_weights: str):
    return {"training": {"steps": steps, "final_weights": final_weights}}


def test_a_manifest_says_what_its_folder_was_last_continued_with(tmp_path):
    first, other = settings(5, "last"), settings(5, "average")
    workdir.claim(tmp_path, "run", first, begun=False)
    made = workdir.read(tmp_path, "run")
    workdir.claim(tmp_path, "run", first, begun=True)
    assert workdir.read(tmp_path, "run") == made
    workdir.claim(tmp_path, "run", other, begun=True)
    assert workdir.read(tmp_path, "run") == {**made, "config": other}
    with pytest.raises(UserError, match=r"training\.steps is 5 there and 6 here"):
        workdir.claim(tmp_path, "run", settings(6, "last"), begun=True)
    assert workdir.settings(tmp_path, "run") == other
