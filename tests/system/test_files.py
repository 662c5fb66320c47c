"""Files of JSON lines, and manifests: what comes back, and what is said of a damaged one."""

import pytest

from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError


def test_lines_come_back_and_a_torn_one_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert files.read_json_lines(path) == []
    files.append_json_line(path, {"a": 1})
    files.append_json_line(path, {"b": "ü\n"})
    with path.open("a") as f:
        f.write('{"c": ')
    assert files.read_json_lines(path) == [{"a": 1}, {"b": "ü\n"}]
    files.append_json_line(path, {"c": 3})
    assert files.read_json_lines(path) == [{"a": 1}, {"b": "ü\n"}, {"c": 3}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl, line 2, is damaged: .*; remove that line"):
        files.read_json_lines(path)


def test_a_manifest_without_settings_is_damaged(tmp_path):
    workdir.claim(tmp_path, "run", {"seed": 1}, begun=False)
    assert workdir.settings(tmp_path, "run") == {"seed": 1}
    files.write_json(tmp_path / workdir.MANIFEST, {"version": 1, "kind": "run"})
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it has no settings"):
        workdir.settings(tmp_path, "run")
