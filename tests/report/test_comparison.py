"""The page that compares systems."""

import json
import shutil

import numpy as np
import pytest
from conftest import evolved_space
from matplotlib import pyplot
from pages import assert_fits
from programs import launch, mistake

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import to_json
from automoe_jax.phases import comparison as phase
from automoe_jax.phases.comparison import compare
from automoe_jax.report import comparison, gains, plots, systems
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

MIXTURES = SearchSpace(
    encoder_experts=(2, 3), decoder_experts=(1, 2), encoder_depths=(2, 4), decoder_depths=(1, 2),
    cross_spans=(1,),
)  # fmt: skip
DENSE = SearchSpace(
    encoder_experts=(1,), decoder_experts=(1,), encoder_depths=(2, 4), decoder_depths=(1, 2),
    cross_spans=(1,),
)  # fmt: skip

# Of the entry of a run's results about a layer's routing.
LAYER = {
    "layer": "encoder 2", "sizes": [64, 128, 64], "load": [0.3, 0.5, 0.2], "entropy": 0.9,
    "share_by_size": {"64": 0.5, "128": 0.5},
    "frequency": {"100 most frequent": [0.1, 0.6, 0.3], "rarer": [0.6, 0.2, 0.2]},
}  # fmt: skip


def model(name, budget, seed, ms, bleu, timed=True):
    """The lines of one model of a study."""
    space = MIXTURES if budget else DENSE
    subnet = to_json(space.sample(np.random.default_rng(seed)))
    scores = {"bleu": bleu, "bleu_95": [bleu - 0.7, bleu + 0.8], "chrf": bleu + 25}
    about = {"name": name, "budget": budget, "seed": seed, "seconds": 1800.0}
    lines = [{
        **about, "kind": "model", "loss": 3.0 - bleu / 50, "subnet": subnet, "params_m": 4.0,
        "active_params_m": 2.5, "gflops": ms / 50, "int8": {**scores, "bleu": bleu - 0.2},
        "fp32": {**scores, "tests": {"test": {"bleu": bleu}, "other": {"bleu": bleu - 9}}},
        "translations": [f"{name} sagt {i}" for i in range(2)],
    }]  # fmt: skip
    if timed:
        own = {
            "fp32": {
                "ms": ms,
                "of_reference": [ms / 12, ms / 12.5, ms / 11.5],
                "parts_ms": {"encoder": [ms / 3, 1, 9], "output layer": [ms / 2, 1, 9]},
            },
            "int8": {"ms": ms / 2, "of_reference": [ms / 24, ms / 25, ms / 23]},
        }
        lines.append({**about, "kind": "latency", "reference_ms": 12.0, **own})
    return lines


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "paper_test.jsonl"
    lines = [
        *model("automoe", 0.5, 0, 6.0, 33.0), *model("automoe", 0.5, 1, 6.2, 34.0),
        *model("automoe", 0.7, 0, 8.2, 35.5), *model("hat", 0.5, 0, 6.1, 32.5),
        *model("mini_transformer_deep_1", 0.0, 0, 5.0, 31.0),
        *model("mini_transformer_big", 0.0, 0, 12.0, 36.0, timed=False),
        {"kind": "teacher", "name": "teacher", "budget": 0.0, "seed": 0, "seconds": 5.0,
         "examples": [{"source": f"say <{i}>", "reference": f"sage {i}"} for i in range(2)]},
        {"kind": "supernet", "name": "automoe", "budget": 0.0, "seed": 0, "seconds": 9.0},
        *({"kind": "search", "name": "automoe", "budget": 0.5, "seed": i, "seconds": 90.0}
          for i in range(2)),
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_seeds_are_one_row(study, tmp_path):
    rows = compare([study], tmp_path / "out", "a test")
    groups = {group.label: group for group in systems.grouped(rows)}
    assert list(groups) == [
        "automoe (0.5)", "automoe (0.7)", "hat (0.5)", "mini_transformer_deep_1",
        "mini_transformer_big",
    ]  # fmt: skip
    own = groups["automoe (0.5)"]
    assert own.bleu("fp32") == (33.5, 33.0, 34.0)  # of several seeds: their range
    assert own.ms("fp32") == pytest.approx(6.1)
    assert groups["hat (0.5)"].bleu("fp32") == (32.5, 31.8, 33.3)  # of one: its interval
    assert groups["mini_transformer_big"].ms("fp32") is None
    header, first, *_ = systems.table(list(groups.values()))
    found = dict(zip(header, first, strict=True))
    assert (found["seeds"], found["BLEU fp32"], found["from"], found["to"]) == (
        "2", "33.50", "33.00", "34.00",
    )  # fmt: skip
    assert found["BLEU other"] == "24.50"
    assert found["speed-up"] == f"{12 / 6.1:.2f}"
    assert found["sparsity"] == "37.5%"
    assert (found["search min"], found["hours"]) == ("3.0", "1.0")
    assert rows[0].parts_ms == {"encoder": 2.0, "output layer": 3.0}
    for name in ("index.html", "systems.png", "systems.svg", "parts.png", "parts.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    page = (tmp_path / "out" / "index.html").read_text()
    assert "say &lt;1&gt;" in page
    assert "hat sagt 1" in page


def test_examples_of_a_corpus_without_a_teacher(tmp_path):
    """They stand in the lines of models."""
    path = tmp_path / "paper_test.jsonl"
    trained, timed = model("hat", 0.5, 0, 6.0, 33.0)
    trained["examples"] = [{"source": f"say <{i}>", "reference": f"sage {i}"} for i in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in (trained, timed)))
    compare([path], tmp_path / "out", "a test")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "say &lt;1&gt;" in page
    assert "hat sagt 1" in page


def test_what_the_gain_is_made_of(study, tmp_path):
    rows = compare([study], tmp_path / "out", "a test")
    header, *found = gains.table(rows)
    assert header == [
        "what", "against", "budget", "BLEU", "95 %", "of each seed", "nats", "inherited", "latency",
        "FLOPs",
    ]  # fmt: skip
    by_hand, deep = "the best dense model made by hand that is as fast", "mini_transformer_deep_1"
    experts = "experts: searched alike without them"
    assert found == [
        [experts, "hat (0.5)", "0.5", "+0.5", "", "one seed", "+0.010", "", "0.98", "0.98"],
        # At 0.7 HAT has none that is as good.
        [gains.AS_GOOD, "hat (0.5)", "0.5", "+0.5", "", "one seed", "+0.010", "", "0.98", "0.98"],
        # The larger one by hand was not timed. 2.5 -+ 12.706 * 0.707 / sqrt(2).
        [by_hand, deep, "0.5", "+2.5", "-3.9, +8.9", "+2.0, +3.0", "+0.050", "", "1.22", "1.22"],
        [by_hand, deep, "0.7", "+4.5", "", "one seed", "+0.090", "", "1.64", "1.64"],
    ]
    assert "What the gain is made of" in (tmp_path / "out" / "index.html").read_text()
    alone = [row for row in rows if row.system.startswith("mini")]
    assert gains.table(alone) == [header]
    # Those of another file are not mixed with them.
    other = study.with_name("paper_other.jsonl")
    other.write_text("".join(json.dumps(x) + "\n" for x in model("automoe", 0.5, 0, 6.0, 33.0)))
    compare([study, other], tmp_path / "both", "a test")
    page = (tmp_path / "both" / "index.html").read_text()
    assert page.count("searched alike without them") == 1


def test_studies_are_not_mixed(study, tmp_path):
    """Each has a picture, rows and examples of its own."""
    other = study.with_name("paper_other.jsonl")
    trained, timed = model("automoe", 0.5, 0, 6.0, 20.0)
    trained["examples"] = [{"source": "another text", "reference": "ein anderer Text"}]
    other.write_text("".join(json.dumps(x) + "\n" for x in (trained, timed)))
    rows = compare([study, other], tmp_path / "both", "a test")
    bleus = {g.label: [row.precisions["fp32"].bleu[0] for row in g.rows]
             for g in systems.grouped(rows)}  # fmt: skip
    assert bleus["paper_test: automoe (0.5)"] == [33.0, 34.0]
    assert bleus["paper_other: automoe (0.5)"] == [20.0]
    page = (tmp_path / "both" / "index.html").read_text()
    assert page.count('alt="BLEU against latency of every system of paper_') == 2
    for name in ("systems", "systems_1"):
        assert (tmp_path / "both" / f"{name}.svg").stat().st_size > 1000
    _, *sentences = page.partition("<h2>Examples</h2>")[2].split("<summary>")
    assert ["paper_test" in x for x in sentences] == [True, True, False]
    assert ["paper_other" in x for x in sentences] == [False, False, True]


def test_models_on_other_kernels_are_named_by_their_cells(study):
    """Not by the machine that timed them, which may have no compiler."""
    lines = [json.loads(line) for line in study.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "latency":
            line["fp32"]["kernels"] = "xla"
    evolved, _ = model("mini_evolved", 0.0, 0, 9.0, 32.0)
    evolved["subnet"] = to_json(evolved_space().largest())
    study.write_text("".join(json.dumps(x) + "\n" for x in (*lines, evolved)))
    names = {row.system for row in phase.of_study(study)[0]}
    assert {name for name in names if "XLA" in name} == {"mini_evolved, on XLA's operations"}


def difference(name, budget, bleu, latency_ratio, other_budget=None, inherited=None):
    """The line that compares automoe's model with another one."""
    part = {"name": name, "budget": budget, "seed": 0}
    return {
        **part, "kind": "difference", "seconds": 60.0, "bleu": bleu, "latency_ratio": latency_ratio,
        "inherited": inherited,
        "ours": {**part, "name": "automoe"},
        "other": part if other_budget is None else {**part, "budget": other_budget},
    }  # fmt: skip


def add(study, *lines):
    with study.open("a") as f:
        f.write("".join(json.dumps(line) + "\n" for line in lines))


def test_what_was_compared_directly_has_intervals(study):
    """Of one seed; also of a model that is the other one there."""
    add(
        study, *model("automoe_inherited", 0.5, 0, 6.0, 33.4),
        difference("hat", 0.5, [0.5, 0.1, 0.9], [0.8, 0.75, 0.85], inherited=[2.5, 2.504]),
        difference("automoe_inherited", 0.5, [-0.4, -0.8, 0.1], [1.02, 0.99, 1.05]),
        difference("random", 0.5, [9.0, 8.0, 10.0], [0.5, 0.4, 0.6]),  # its model is not there
    )  # fmt: skip
    rows, _ = phase.of_study(study)
    header, *found = gains.table(rows)
    by_what = {row[0]: dict(zip(header, row, strict=True)) for row in found}
    assert not any("random" in what for what in by_what)
    experts = by_what["experts: searched alike without them"]
    assert (experts["BLEU"], experts["95 %"]) == ("+0.5", "+0.1, +0.9")
    assert experts["latency"] == "0.80 [0.75, 0.85]"
    assert (experts["nats"], experts["inherited"]) == ("+0.010", "+0.004")
    inherited = by_what["training: inherited weights"]
    assert (inherited["BLEU"], inherited["95 %"]) == ("+0.4", "-0.1, +0.8")
    assert inherited["latency"] == "0.98 [0.95, 1.01]"


def test_direct_latencies_of_some_seeds_are_not_mixed_with_others(study):
    add(study, difference("mini_transformer_deep_1", 0.5, [2.0, 1.0, 3.0], [0.9, 0.8, 1.1], 0.0))
    rows, _ = phase.of_study(study)
    by_hand = next(x for x in gains.gains(rows) if "dense model made by hand" in x.what)
    assert by_hand.latencies == pytest.approx((6.0 / 5.0, 6.2 / 5.0))


def test_what_is_surely_slower_in_turns_is_not_as_fast(study):
    slower = difference("mini_transformer_deep_1", 0.7, [4.5, 4, 5], [0.9, 0.85, 0.95], 0.0)
    add(study, slower)
    rows, _ = phase.of_study(study)
    found = [x.budget for x in gains.gains(rows) if "dense model made by hand" in x.what]
    assert found == ["0.5"]


def test_the_fastest_of_hat_that_is_as_good(study):
    """At any budget; of two that are, the faster one."""
    add(study, *model("hat", 0.7, 0, 9.0, 35.2), *model("hat", 0.9, 0, 8.8, 35.0))
    rows, _ = phase.of_study(study)
    found = {x.budget: x for x in gains.gains(rows) if x.what == gains.AS_GOOD}
    assert {budget: x.against for budget, x in found.items()} == {
        "0.5": ("hat (0.5)",), "0.7": ("hat (0.9)",),
    }  # fmt: skip
    assert found["0.7"].latencies == pytest.approx((8.2 / 8.8,))
    # What a direct comparison says goes before their own intervals.
    add(study, difference("hat", 0.7, [-0.1, -0.5, 0.3], [0.5, 0.4, 0.6]))
    add(study, difference("hat", 0.5, [0.5, 0.1, 0.9], [0.98, 0.9, 1.05]))
    rows, _ = phase.of_study(study)
    found = {x.budget: x.against for x in gains.gains(rows) if x.what == gains.AS_GOOD}
    assert found == {"0.5": ("hat (0.9)",), "0.7": ("hat (0.9)",)}


def test_a_gain_that_is_bought_with_latency_is_none(study, benchmark):
    paper_systems, goals_of = benchmark("paper_systems"), benchmark("paper_tables").goals_of
    rows, _ = phase.of_study(study)
    by_what = {(x.what, x.budget): x.as_fast for x in gains.gains(rows)}
    assert by_what[gains.AS_GOOD, "0.5"] is True
    assert by_what[gains.DENSE_BY_HAND, "0.7"] is False
    own = {gains.DENSE_BY_HAND: 2.0, gains.MIXTURE_BY_HAND: 1.0}
    corpus = paper_systems.Corpus("quickstart", (1, 1, 0), (0.5,), goals=own, best=(36.0, 6.1))
    goals = goals_of(corpus, rows)
    assert {name: (goal["value"], goal["met"]) for name, goal in goals.items()} == {
        # 1 / (6.0 / 6.1) over 1.3
        f"{gains.AS_GOOD}, 0.5: speed or FLOPs, share of the goal": (0.7821, False),
        f"{gains.DENSE_BY_HAND}, 0.5": (2.5, False),  # it is 1.22 times as slow
        f"{gains.DENSE_BY_HAND}, 0.7": (4.5, False),
        "the best BLEU within 6.1 ms": (35.3, False),  # in int8
    }  # fmt: skip
    add(study, *model("mini_transformer_4_1", 0.0, 0, 6.1, 30.5))
    add(study, *model("mini_transformer_4_1", 0.0, 1, 6.3, 32.5))
    rows = [row for row in phase.of_study(study)[0] if row.system != "mini_transformer_deep_1"]
    goals = goals_of(corpus, rows)
    assert goals[f"{gains.DENSE_BY_HAND}, 0.5"] == {"value": 2.0, "goal": 2.0, "met": True}
    assert not goals_of(paper_systems.CORPORA["quickstart"], rows)  # to try it out


def test_a_speed_that_is_bought_with_bleu_is_none(study, benchmark):
    corpora, goals_of = benchmark("paper_systems").CORPORA, benchmark("paper_tables").goals_of
    add(study, difference("hat", 0.5, [-0.6, -1.0, -0.1], [0.5, 0.4, 0.6]))
    name = f"{gains.AS_GOOD}, 0.5: speed or FLOPs, share of the goal"
    rows, _ = phase.of_study(study)
    assert goals_of(corpora["msdocs"], rows)[name] == {"value": 1.5385, "goal": 1.0, "met": False}
    # What was not timed yet misses no goal.
    lines = [json.loads(line) for line in study.read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "model"]
    study.write_text("".join(json.dumps(line) + "\n" for line in trained))
    rows, _ = phase.of_study(study)
    assert len(rows) == 6
    assert goals_of(corpora["msdocs"], rows) == {}


def test_the_best_by_hand_may_have_another_seed(study):
    """Each system of a family counts, whether it has this seed or not."""
    for seed, bleu in ((0, 31.5), (1, 30.5)):
        add(study, *model("mini_transformer_4_1", 0.0, seed, 5.1, bleu))
    rows, _ = phase.of_study(study)
    found = next(x for x in gains.gains(rows) if "dense model made by hand" in x.what)
    # At seed 0 the new one, at seed 1 the old one's only model.
    assert found.against == ("mini_transformer_4_1", "mini_transformer_deep_1")
    assert found.bleus == pytest.approx((1.5, 3.0))


def test_what_cannot_be_compared(tmp_path, study):
    with pytest.raises(UserError, match="neither the workdir of a finished pipeline"):
        compare([tmp_path], tmp_path / "out", "a test")
    other = tmp_path / "other.jsonl"
    other.write_text('{"option": "plain"}\n')
    with pytest.raises(UserError, match="is no result file of benchmarks/paper_tables"):
        compare([other], tmp_path / "out", "a test")
    # The last line has no end: it counts, and the file stays as it is.
    text = json.dumps({"kind": "supernet", "name": "a", "budget": 0, "seed": 0})
    other.write_text(text)
    with pytest.raises(UserError, match="no model is finished there yet"):
        compare([other], tmp_path / "out", "a test")
    assert other.read_text() == text
    other.write_text(f"{text}\nnothing\n")
    with pytest.raises(UserError, match="line 2, is not JSON"):
        compare([other], tmp_path / "out", "a test")
    assert not (tmp_path / "out").exists()


def test_the_models_of_a_study_have_learning_curves(study, tmp_path):
    """Those that say their losses by update, of each system's first seed."""
    lines = [json.loads(line) for line in study.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "model" and line["name"] != "hat":
            line["losses"] = {"20": 5.0, "100": 3.0, "60": 4.0}  # as JSON has them
    study.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = compare([study], tmp_path / "out", "a test")
    assert rows[0].losses == {20: 5.0, 60: 4.0, 100: 3.0}
    shown = (tmp_path / "out" / "index.html").read_text().partition("<h2>Trainings</h2>")[2]
    assert shown.count("<svg") == 1
    # A legend with each system, drawn as shapes: their names stand in comments.
    legend = shown.partition('id="legend_1"')[2]
    for name in ("automoe (0.5)", "automoe (0.7)", "mini_transformer_big"):
        assert legend.count(f"<!-- {name} -->") == 1
    assert "hat" not in legend


def test_a_pipelines_run(tmp_path, study, monkeypatch):
    """Its trained subnets, and its trainings' curves."""
    subnet = to_json(MIXTURES.largest())
    row = {
        "subnet": subnet, "params": 2e6, "active_params": 1e6, "flops": 7e7,
        "latency": {"mean_ms": 20.0}, "latency_ratio": [0.6, 0.59, 0.61], "bleu_trained": None,
    }  # fmt: skip
    rows = [
        {**row, "name": "largest"}, {**row, "name": "searched"},
        {**row, "name": "random within the limit", "bleu_trained": 60.0, "chrf_trained": 70.0},
    ]  # fmt: skip
    run = tmp_path / "run"
    rows[1] |= {"bleu_trained": 61.5, "bleu_trained_95": [60.5, 62.5]}
    results = {"version": 1, "rows": rows, "test": {"bleu": 61.5, "chrf": 72.0}, "routing": [LAYER]}
    (run / "report").mkdir(parents=True)
    plots.routing_plot([LAYER], run / "report" / "routing.png")
    files.write_json(run / "report" / "results.json", results)
    monkeypatch.setattr(phase, "read_manifest", lambda path: {"quantization": "none"})
    (run / "subnet" / "1").mkdir(parents=True)
    lines = [
        {"step": s, "wall_s": s, "name": "train/loss", "value": 5.0 - s / 10} for s in range(9)
    ]
    (run / "subnet/1/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = compare([run, study], tmp_path / "out", "a test")
    bleus = {row.label: row.precisions["fp32"].bleu for row in found[:2]}
    assert bleus == {
        "run: searched": (61.5, 60.5, 62.5), "run: random within the limit": (60.0, None, None),
    }  # fmt: skip
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<svg" in page
    assert "Trainings" in page
    # Of the frequent tokens 10 % + 30 % go to an FFN of 64, of the rarer ones 60 % + 20 %.
    section = page.partition("<h2>Experts of run</h2>")[2].partition("<h2>")[0]
    for row in (["encoder 2", "64", "50%", "40%", "80%"], ["", "128", "50%", "60%", "20%"]):
        assert "".join(f"<td>{cell}</td>" for cell in row) in section
    monkeypatch.setattr(phase, "read_manifest", lambda path: {"quantization": "int8"})
    first, *_ = compare([run, study], tmp_path / "int8", "a test")
    assert list(first.precisions) == ["int8"]
    # Its share of another run's reference is not known: all are shown in ms.
    labels = {}
    for name, rows in {"both": found, "study": found[2:]}.items():
        figure = comparison.figure(systems.grouped(rows))
        labels[name] = figure.axes[0].get_xlabel()
        pyplot.close(figure)
    assert labels["both"] == "latency, fp32 (ms)"
    assert labels["study"] == "latency, fp32 (share of the reference's)"
    header, row, *_ = systems.table(systems.grouped(found))
    known = dict(zip(header, row, strict=True))
    assert (known["from"], known["to"], known["speed-up"]) == ("60.50", "62.50", "")
    # Runs of the same name are told apart, not averaged.
    shutil.copytree(run, tmp_path / "other" / "run")
    found = compare([run, tmp_path / "other" / "run"], tmp_path / "out", "a test")
    assert found[0].label == f"{tmp_path.name}/run: searched"
    assert found[2].label == "other/run: searched"
    assert len(systems.grouped(found)) == 4


def test_the_command(study, tmp_path):
    found = launch("report", str(study), f"--out={tmp_path / 'out'}", "--json")
    rows = json.loads(found.stdout)
    assert rows[0]["system"] == "automoe (0.5)"
    assert (tmp_path / "out" / "index.html").exists()
    assert "no run is given" in mistake("report")
    assert "neither the workdir" in mistake("report", str(tmp_path))
    (tmp_path / "results.json").write_text("{}")
    assert "is the report of a pipeline" in mistake("report", str(study), f"--out={tmp_path}")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(study, tmp_path, browser, width, scheme):
    compare([study], tmp_path / "out", "a test")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url)
            if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
    page.goto(f"file://{tmp_path}/out/index.html")
    assert_fits(page, width)

    def column(nth):
        return page.locator(f".sortable tbody td:nth-child({nth})").all_inner_texts()

    page.click("text=BLEU fp32")
    bleus = [float(x) for x in column(9)]
    assert bleus == sorted(bleus, reverse=True)
    page.click("text=BLEU fp32")
    assert [float(x) for x in column(9)] == sorted(bleus)
    page.click(".sortable th:first-child button")
    assert column(1) == sorted(column(1))
    page.click("text=ms fp32")
    assert column(7)[-1] == ""  # what was not timed goes last
    assert said == []
    page.close()
