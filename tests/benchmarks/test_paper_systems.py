"""The systems that are compared, and the parts of their comparison."""

import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT
from programs import launch

from automoe_jax.architecture.counts import count
from automoe_jax.architecture.subnet import to_json
from automoe_jax.config import resolve
from automoe_jax.published.subnet_files import load
from automoe_jax.system.errors import UserError
from benchmarks.paper_systems import (
    ARCHITECTURES,
    CORPORA,
    SYSTEMS,
    Part,
    batches,
    compared,
    parts,
    search_of,
    systems,
)

CONFIG = runpy.run_path(str(ROOT / "configs" / "systems.py"))


def space_of(name: str):
    return resolve(CONFIG["get_config"](name)).space


@pytest.mark.parametrize("corpus", CONFIG["CORPORA"])
def test_every_system_is_a_space_of_every_corpus(corpus):
    spaces = {name: space_of(f"{corpus}:{name}") for name in CONFIG["SYSTEMS"]}
    for space in spaces.values():
        space.validate(space.largest())
    assert spaces["hat"].size() < spaces["automoe_standard"].size() < spaces["automoe"].size()
    assert {len(x.experts) for x in spaces["hat"].largest().encoder.layers} == {1}
    assert max(spaces["experts_16"].decoder_experts) == 16
    placed = spaces["placement_121212"].largest().encoder.layers
    assert [len(layer.experts) for layer in placed] == [1, 2, 1, 2, 1, 2]
    assert 0 in spaces["identity"].smallest().encoder.layers[0].experts
    sizes = {*spaces["identity"].encoder_ffn_dims}
    assert sizes == {max(spaces["automoe"].encoder_ffn_dims)}


def test_architectures_by_hand_fit_their_space():
    for corpus in ("msdocs", "multi30k", "quickstart"):
        for path in ARCHITECTURES.glob("*.json"):
            space_of(f"{corpus}:{SYSTEMS[path.stem].holder}").validate(load(path))
    for name in ("small", "base", "deep_1", "deep_2"):
        full_size = load(ROOT / f"configs/subnets/transformer_{name}.json")
        space_of("wmt14:by_hand").validate(full_size)
    flops = {path.stem: count(load(path)).flops for path in ARCHITECTURES.glob("*.json")}
    assert max(flops, key=flops.__getitem__) == "mini_transformer_big"
    # Experts of one size are used one at a time: the FLOPs of the dense model, but for the routers.
    for depths in ("4_1", "deep_2"):
        dense = flops[f"mini_transformer_{depths}"]
        assert flops[f"mini_switch_{depths}"] == pytest.approx(dense, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIG["SYSTEMS"])
def test_a_dry_run_at_full_size(name):
    """Its step compiles; the supernet has every weight that its largest subnet has."""
    flags = [f"--config=configs/systems.py:wmt14:{name}", "--dry_run"]
    if name == "evolved":  # has no supernet
        flags.append("--subnet=configs/subnets/evolved_base.json")
    done = launch("train", *flags, timeout=900)
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, said
    assert "memory per device: " in said
    if name != "evolved":
        weights, largest = (
            float(re.findall(rf"{what}: ([\d,.]+).* parameters", said)[0].replace(",", ""))
            for what in ("supernet", "largest subnet")
        )
        table = 32_768 * 640
        assert weights - 1e6 * largest == pytest.approx(table, abs=1e5)


def test_an_unknown_system_is_named():
    with pytest.raises(UserError, match="is not a corpus and a system"):
        CONFIG["get_config"]("msdocs:hot")
    with pytest.raises(UserError, match="msdocs, multi30k"):
        CONFIG["get_config"]("")


@pytest.mark.parametrize("corpus", CORPORA)
def test_parts_come_after_what_they_need(corpus):
    found = list(parts(CORPORA[corpus], list(SYSTEMS), 3))
    assert len(set(found)) == len(found)
    place = {part: i for i, part in enumerate(found)}
    for part in found:
        if part.kind == "latency":
            assert place[part._replace(kind="model")] < place[part]
        if part.kind == "difference":
            assert max(place[model] for model in compared(part)) < place[part]
        if part.kind == "model" and SYSTEMS[part.name].space:
            assert place[search_of(part)] < place[part]
        if part.kind == "model" and SYSTEMS[part.name].distilled and CORPORA[corpus].distils:
            assert place[Part("teacher", "teacher")] < place[part]
        if part.kind == "search":
            others = ("random", "automoe_flops", "automoe_calibrated")
            space = "automoe" if part.name in others else part.name
            assert place[Part("supernet", space, seed=part.seed)] < place[part]
            assert place[Part("largest", space)] < place[part]
            if SYSTEMS[part.name].calibrated:
                assert place[Part("ranking", space)] < place[part]
        if part.name == "automoe_flops":
            assert place[part._replace(kind="search", name="automoe")] < place[part]


def test_no_batch_needs_a_part_of_its_own():
    """Also where no search stands between the teacher and the models that learn from it.

    Without the searched mixture nothing is searched for what would be compared with it.
    """
    found = list(parts(CORPORA["multi30k"], ["mini_transformer_big", "mini_transformer_4_1"], 1))
    made = list(batches(found))
    assert [part for batch in made for part in batch] == found
    assert [{part.kind for part in batch} for batch in made] == [
        {"teacher"}, {"model"}, {"latency"},
    ]  # fmt: skip
    for batch in batches(list(parts(CORPORA["multi30k"], list(SYSTEMS), 3))):
        kinds = {part.kind for part in batch}
        assert len(kinds) == 1 or kinds == {"supernet", "teacher"}


def test_a_corpus_without_a_teacher():
    """What would differ from another system in having none is left out."""
    found = list(parts(CORPORA["msdocs"], systems(CORPORA["msdocs"]), 1))
    assert not [part for part in found if part.kind == "teacher"]
    assert not [part for part in found if part.name == "automoe_undistilled"]
    assert "automoe_undistilled" in systems(CORPORA["multi30k"])
    taught = list(parts(CORPORA["multi30k"], ["automoe_undistilled"], 1))
    assert Part("teacher", "teacher") not in taught  # it has none, where the others have one


def test_what_is_another_system_is_left_out():
    for corpus in ("msdocs", "multi30k", "quickstart"):
        for name in CORPORA[corpus].same:
            assert space_of(f"{corpus}:{name}") == space_of(f"{corpus}:automoe")
            assert name not in systems(CORPORA[corpus])
    assert space_of("multi30k:experts_4") != space_of("multi30k:automoe")
    assert "experts_4" in systems(CORPORA["multi30k"])


def test_some_budgets():
    """Those of one budget; what is compared at the middle one alone is compared there or not."""
    corpus, names = CORPORA["msdocs"], ["automoe", "identity", "mini_transformer_base"]
    low, middle = (
        [part for part in parts(corpus, names, 1, [budget]) if part.kind == "model"]
        for budget in (0.35, 0.5)
    )
    assert low == [Part("model", "automoe", 0.35), Part("model", "mini_transformer_base")]
    assert [part.name for part in middle] == ["automoe", "identity", "mini_transformer_base"]
    assert {part.budget for part in middle} == {0.5, 0.0}
    whole = set(parts(corpus, names, 1))
    some = set(parts(corpus, names, 1, [0.35, 0.7])) | set(parts(corpus, names, 1, [0.5]))
    assert some == whole


def test_what_is_compared_directly():
    corpus = CORPORA["msdocs"]
    found = parts(corpus, ["automoe", "hat", "identity", "mini_transformer_small"], 1)
    differences = sorted((part.name, part.budget) for part in found if part.kind == "difference")
    assert differences == [
        *(("hat", budget) for budget in corpus.budgets),
        ("identity", 0.5),
        *(("mini_transformer_small", budget) for budget in corpus.budgets),
    ]
    assert compared(Part("difference", "hat", 0.35, 2)) == (
        Part("model", "automoe", 0.35, 2), Part("model", "hat", 0.35, 2),
    )  # fmt: skip
    _, by_hand = compared(Part("difference", "mini_transformer_small", 0.35, 2))
    assert by_hand == Part("model", "mini_transformer_small", 0.0, 2)


def test_a_difference_is_that_of_ours(benchmark, tmp_path, monkeypatch):
    paper_study = benchmark("paper_study")
    study = paper_study.Study(CORPORA["msdocs"], tmp_path)
    references = ["guten Morgen, liebe Welt.", "das ist ein kleines Haus."]
    texts = {"automoe": references, "hat": [references[0], "das war kein grosser Baum."]}
    for name, lines in texts.items():
        run = tmp_path / "models" / f"{name}-0.5-0"
        run.mkdir(parents=True)
        (run / "test_export_fp32.txt").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(paper_study, "stored_split", lambda run, name: None)
    monkeypatch.setattr(
        paper_study.evaluation, "read_split", lambda split: (references, references)
    )
    timed = []

    def in_turns(self, *exports, **how):
        timed.extend(path.parent.name for path in exports)
        return [{"ratio_to_first": [1.0, 1.0, 1.0]}, {"ratio_to_first": [0.8, 0.7, 0.9]}]

    monkeypatch.setattr(paper_study.Study, "_timed", in_turns)
    # Scored once with HAT's subnet in the space, and once outside it.
    options = benchmark("supernet_options")
    monkeypatch.setattr(options, "inherited", lambda run, subnets: [len(subnets), 3.0])
    inside, outside = (to_json(space_of(name).smallest()) for name in ("msdocs:hat", "wmt14:hat"))
    ours, other = compared(Part("difference", "hat", 0.5))
    lines = {ours: {"subnet": inside}, other: {"subnet": outside}}
    assert study.do(Part("difference", "hat", 0.5), None, lines)["inherited"] is None
    timed.clear()
    lines[other]["subnet"] = inside
    found = study.do(Part("difference", "hat", 0.5), None, lines)
    assert found["inherited"] == [2, 3.0]
    assert timed == ["hat-0.5-0", "automoe-0.5-0"]  # ours as a share of the other's
    assert found["latency_ratio"] == [0.8, 0.7, 0.9]
    assert found["ours"] == {"name": "automoe", "budget": 0.5, "seed": 0}
    assert found["other"]["name"] == "hat"
    assert found["bleu"][0] > 10


def test_claims_have_seeds():
    found = list(parts(CORPORA["msdocs"], list(SYSTEMS), 3))
    models = [part for part in found if part.kind == "model"]
    assert sum(part.name == "automoe" for part in models) == 9  # three seeds at three budgets
    assert sum(part.name == "automoe_standard" for part in models) == 1
    assert sum(part.name == "mini_transformer_deep_1" for part in models) == 3
    only = list(parts(CORPORA["msdocs"], ["automoe_flops"], 1))
    assert Part("search", "automoe", 0.5) in only  # whose FLOPs are its limit
    assert not [part for part in only if part.kind == "model" and part.name == "automoe"]


def test_kinds_of_parts_need_those_before(tmp_path):
    """What a part needs is told before anything is done."""
    command = [sys.executable, str(ROOT / "benchmarks" / "paper_tables.py"), "--corpus=quickstart"]
    given = ["--kinds=model", "--only=hat", f"--results={tmp_path / 'x'}", f"--workdir={tmp_path}"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model hat at 0.6, seed 0 needs search hat at 0.6, seed 0: give search to" in done.stderr
    listed = subprocess.run(
        [*command, *given, "--list"], capture_output=True, text=True, check=True
    ).stdout
    assert "0 of 3 done" in listed
    assert "supernet" not in listed
    other = subprocess.run([*command, "--budgets=0.7"], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "--budgets names 0.7; allowed: 0.6" in other.stderr
