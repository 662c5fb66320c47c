"""Files of JSON lines: appended lines come back, a torn one is cut off."""

from automoe_jax.system import jsonl


def test_lines_come_back_and_a_torn_one_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert jsonl.read_lines(path) == []
    jsonl.append_line(path, {"a": 1})
    jsonl.append_line(path, {"b": "ü\n"})
    with path.open("a") as f:
        f.write('{"c": ')
    assert jsonl.read_lines(path) == [{"a": 1}, {"b": "ü\n"}]
    jsonl.append_line(path, {"c": 3})
    assert jsonl.read_lines(path) == [{"a": 1}, {"b": "ü\n"}, {"c": 3}]
