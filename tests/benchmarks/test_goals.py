"""What decides whether a benchmark ends with 1."""

import argparse

import pytest


def test_goals_of_options(benchmark):
    """Means over seeds; what scores other subnets, or trained longer, does not count."""
    options = benchmark("supernet_options")

    def line(option, seed, random, gain):
        return {"option": option, "seed": seed, "random": random, "gain": gain}

    rows = [
        line("plain", 0, 3.0, 0.0), line("plain", 1, 3.2, 0.02), line("jitter", 0, 3.007, 0.1),
        line("sandwich", 0, 2.9, 0.2), line("sandwich", 1, 3.2, 0.06),
        line("from_trained", 0, 2.0, 0.3),
    ]  # fmt: skip
    found = options.goals_of(rows)
    assert {name: (goal["value"], goal["met"]) for name, goal in found.items()} == {
        "random subnets: least loss, share of plain's": (0.97, True),
        "eight experts: most gain, nats": (0.13, True),
    }
    assert list(options.goals_of(rows[2:3])) == ["eight experts: most gain, nats"]
    assert options.goals_of([]) == options.goals_of(rows[-1:]) == {}


@pytest.mark.parametrize("given", ["", "8,x", "8,3", "-8"])
def test_lists_of_integers(benchmark, given, capsys):
    measure, parser = benchmark("measure"), argparse.ArgumentParser()
    assert measure.integers(parser, "--tokens", "4,128", 4) == [4, 128]
    with pytest.raises(SystemExit):
        measure.integers(parser, "--tokens", given, 4)
    assert f"--tokens is {given!r}; give integers of at least 4" in capsys.readouterr().err
