"""Files of JSON lines: appended lines come back, a torn one is cut off."""

from automoe_jax.system import files


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
