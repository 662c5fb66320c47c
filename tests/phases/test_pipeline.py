"""The whole way on a tiny scale, killed and started again."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import ROOT, shipped_config
from tiny import KillAt, Killed, tiny_config

from automoe_jax.architecture.subnet import to_json
from automoe_jax.config import PipelineConfig, RunConfig, base, resolve
from automoe_jax.data import tokens
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.decoding import weight_file
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.manifest import WEIGHTS
from automoe_jax.decoding.translator import Translator
from automoe_jax.phases import halving
from automoe_jax.phases.pipeline import finalists_of, run_pipeline
from automoe_jax.phases.rank import spread
from automoe_jax.phases.run import Run, check_out, open_run
from automoe_jax.phases.search import run_search
from automoe_jax.phases.weights import subnet_params, trained_folder
from automoe_jax.published import subnet_files
from automoe_jax.search.candidates import InfeasibleError
from automoe_jax.search.config import ConstraintConfig, SearchConfig
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress, Silent
from automoe_jax.training.config import ModelConfig

SILENT = Silent()


def pipeline_of(config, folder, progress: Progress = SILENT):
    """Results of the whole pipeline."""
    return run_pipeline(open_run(config, folder, progress))


TAUGHT = {"teacher": "supernet", "distill": "supernet", "distill_choice": "nearest"}
ONE_KILL = ("finalist 2: validation",)  # one in a search: test_search_phase.py
ALL_KILLS = "train: ", "iteration 1", "of them translated", "finalist 2: validation", "measuring"


@pytest.mark.parametrize(
    ("kills", "taught"),
    [(ONE_KILL, {}), pytest.param(ALL_KILLS, TAUGHT, marks=pytest.mark.slow)],
    ids=["plain", "taught"],
)
def test_pipeline_survives_kills(tmp_path, tmp_path_factory, kills, taught):
    config = tiny_config()
    pipeline = dataclasses.replace(config.pipeline, train_random=True, **taught)
    alone = dataclasses.replace(config, pipeline=dataclasses.replace(pipeline, train_random=False))
    config = dataclasses.replace(config, pipeline=pipeline)
    for words in kills:
        with pytest.raises(Killed):
            pipeline_of(alone, tmp_path, KillAt(words))
    history = (tmp_path / "search" / "history.jsonl").read_text().splitlines()
    assert pipeline_of(alone, tmp_path)["gain_over_random"] is None
    results = pipeline_of(config, tmp_path)  # a random subnet is wanted, too
    # What was scored before the kills was not scored again.
    assert len({json.dumps(json.loads(x)["subnet"]) for x in history}) == len(history)

    assert [row["name"] for row in results["rows"]] == [
        "largest", "smallest", "random within the limit", "searched",
    ]  # fmt: skip
    limit = 2.5e-4
    by_name = {row["name"]: row for row in results["rows"]}
    assert by_name["searched"]["flops"] / 1e9 <= limit < by_name["largest"]["flops"] / 1e9
    assert by_name["random within the limit"]["flops"] / 1e9 <= limit
    assert all(row["latency"]["runs"] == 6 for row in results["rows"])
    assert 0 <= results["test"]["bleu"] <= 100
    assert results["random"]["count"] == 6
    # The random subnet was trained as the finalists were.
    trained = [row["bleu_trained"] for row in results["rows"]]
    assert trained[:2] == [None, None]
    assert trained[3] == results["test"]["bleu"]
    gain = results["gain_over_random"]
    assert gain["bleu"] == pytest.approx(trained[3] - trained[2])
    assert gain["low"] <= gain["bleu"] <= gain["high"]
    for row in results["rows"][2:]:
        low, high = row["bleu_trained_95"]
        assert low <= row["bleu_trained"] <= high
    assert 0 <= results["repeating"] <= results["test"]["sentences"]
    theirs = json.loads((tmp_path / "subnet/random/manifest.json").read_text())["config"]
    ours = json.loads((tmp_path / "subnet/1/manifest.json").read_text())["config"]
    assert theirs["subnet"] != ours["subnet"]
    assert theirs["subnet_training"] == ours["subnet_training"]

    if taught:
        check_taught(tmp_path, ours)
        check_teacher_elsewhere(alone, tmp_path, tmp_path_factory.mktemp("student"))
    # All layers have experts here; the report shows where tokens go.
    assert [layer["layer"] for layer in results["routing"]] == ["encoder 1", "decoder 1"]
    losses = results["routing_losses"]
    assert set(losses) == {"learned", "random", "largest"}
    assert f"random experts {losses['random']:.3f}" in (tmp_path / "report/index.html").read_text()
    for layer in results["routing"]:
        assert sum(layer["load"]) == pytest.approx(1)
        assert all(sum(own) == pytest.approx(1) for own in layer["place"].values() if any(own))
    for name in (
        "search/best_1.json",
        "report/index.html",
        "report/search.png",
        "search/search.png",
    ):
        assert (tmp_path / name).stat().st_size > 0
    best = subnet_files.load(tmp_path / "search" / "best_1.json")
    config.space.validate(best)
    translator = Translator.load(tmp_path / "export")
    assert translator.manifest["scores"]["test"]["bleu"] == results["test"]["bleu"]
    assert len(translator.translate(["Today is Monday."], beam_size=2)) == 1

    # An export has the scale of the FFNs inside its weights.
    run = open_run(config, tmp_path, SILENT)
    params, _, _ = subnet_params(run, trained_folder(run))
    trained = params["encoder"]["layer_0"]["experts"]["fc2_bias"][0]
    exported = weight_file.load(tmp_path / "export" / WEIGHTS)["encoder.0.expert_0.fc2.bias"]
    assert np.abs(trained).max() > 0
    np.testing.assert_allclose(exported, config.space.ffn_scale * trained, rtol=1e-6)

    # Everything is done: again costs nothing, changes nothing, and says so.
    again = KillAt("step ")
    assert pipeline_of(config, tmp_path, again) == results
    phases = [note for note in again.notes if note.startswith("phase")]
    assert len(phases) == 5
    assert all(note.endswith(", which is done") for note in phases)
    chosen = json.loads((tmp_path / "subnet/chosen.json").read_text())
    assert (tmp_path / chosen["folder"] / "export/manifest.json").exists()
    wider = dataclasses.replace(tiny_config(gflops=1e-3), pipeline=pipeline)
    with pytest.raises(UserError, match=r"search\.constraint\.gflops is 0\.00025 there"):
        pipeline_of(wider, tmp_path)
    other = dataclasses.replace(config, model=ModelConfig(0.4, 0.1))
    with pytest.raises(UserError, match=r"model\.dropout is 0\.3 there and 0\.4 here"):
        pipeline_of(other, tmp_path)
    other = dataclasses.replace(config, export=ExportConfig((1,)))
    with pytest.raises(UserError, match=r"export\.beam_sizes is \[2\] there"):
        pipeline_of(other, tmp_path)
    average = {"final_weights": "average", "averaged_checkpoints": 1}
    training = dataclasses.replace(config.subnet_training, **average)
    other = dataclasses.replace(config, subnet_training=training)
    with pytest.raises(UserError, match="subnet_weights is 'last' there and 'average of 1' here"):
        pipeline_of(other, tmp_path)
    training = dataclasses.replace(config.subnet_training, peak_rate=1e-4)
    other = dataclasses.replace(config, subnet_training=training)
    with pytest.raises(UserError, match=r"subnet_training\.peak_rate is .* there and 0\.0001 here"):
        pipeline_of(other, tmp_path)
    # A finished run is moved as one piece.
    moved = tmp_path.with_name(f"{tmp_path.name}_moved")
    tmp_path.rename(moved)
    assert pipeline_of(config, moved, KillAt("step ")) == results


def check_taught(folder, finalist):
    """A finalist learned from the largest subnet, and from its translations."""
    assert (finalist["teacher"], finalist["text"]) == ("supernet", "distilled")
    how = json.loads((folder / "distilled/manifest.json").read_text())["config"]
    assert (how["choice"], how["n_best"], how["beam_size"]) == ("nearest", 1, 5)
    counts = json.loads((folder / "distilled/distilled.json").read_text())
    assert 400 < counts["pairs"] == 400 + counts["translated"]
    assert (
        len(tokens.load(folder / "distilled/tokens/train"))
        - len(tokens.load(folder / "tokens/train"))
        > 1
    )


def check_teacher_elsewhere(config, teacher, student):
    """Another run learns from the model that this one chose, with its tokenizer."""
    named = {"teacher": str(teacher), "distill": "", "distill_choice": "best"}
    pipeline = dataclasses.replace(config.pipeline, **named)
    pipeline_of(dataclasses.replace(config, pipeline=pipeline), student)
    finalist = json.loads((student / "subnet/1/manifest.json").read_text())["config"]
    assert finalist["teacher"] == str(teacher)
    assert finalist["teacher_origin"].startswith("trained subnet, step ")
    ours, theirs = (tokenizers.load(folder / "tokenizer").content for folder in (student, teacher))
    assert ours == theirs


@pytest.mark.parametrize(
    ("group", "fields", "words"),
    [
        ("search", {"constraint": ConstraintConfig()}, "no limit for the search"),
        ("search", {"constraint": ConstraintConfig(gflops=1e-9)}, "no subnet can meet gflops"),
        (
            "search",
            {"constraint": ConstraintConfig(latency_ms=9), "latency_model": "no.json"},
            "no.json",
        ),
        ("search", {"constraint": ConstraintConfig(latency_ms=1e-3)}, "no subnet can meet latency"),
        ("search", {"algorithm": "local", "start": "no.json"}, "no.json"),
        ("latency", {"threads": 10**6}, "threads is 1000000"),
        ("latency", {"platform": "gpu"}, "JAX finds no gpu"),
        ("sampling", {"largest_first": 8}, "only the largest subnet would be trained"),
        ("training", {"inherited_experts": "used"}, "config.subnet_training.inherited_experts"),
        ("pipeline", {"teacher": "nowhere"}, "neither a workdir nor an export"),
        ("pipeline", {"distill": "nowhere"}, "nowhere"),
        (
            "pipeline",
            {"distill": "supernet", "distill_n_best": 6},
            "pipeline.distill_n_best is 6; allowed: 1 to the beam of supernet, 5",
        ),
    ],
)
def test_what_a_later_phase_would_refuse_is_said_before_training(tmp_path, group, fields, words):
    config = tiny_config()
    changed = {group: dataclasses.replace(getattr(config, group), **fields)}
    with pytest.raises((UserError, InfeasibleError), match=words):
        pipeline_of(dataclasses.replace(config, **changed), tmp_path)
    assert not (tmp_path / "supernet").exists()


def test_an_export_is_no_workdir(tmp_path):
    workdir.write(tmp_path, "export", {})
    with pytest.raises(UserError, match="is of kind export, not run"):
        open_run(tiny_config(), tmp_path, SILENT)
    assert [path.name for path in tmp_path.iterdir()] == [workdir.MANIFEST]


@pytest.mark.parametrize("name", ["", ".", "/abs", "a/../../b", "tokens", "corpus/x"])
def test_results_go_into_a_folder_of_the_workdir(tmp_path, name):
    run = Run(tiny_config(), tmp_path, SILENT)
    check_out(run, "search_60ms")
    with pytest.raises(UserError, match="give the name of a folder in the workdir"):
        check_out(run, name)


@pytest.mark.parametrize("steps", [0, 30])
def test_finalists_are_chosen_by_short_trainings(tmp_path, monkeypatch, steps):
    config = tiny_config()
    subnets = spread(config.space, 5, seed=0)
    for i, subnet in enumerate(subnets):
        files.write_json(tmp_path / "search" / f"best_{i}.json", to_json(subnet))
    found = {"best": [{"file": f"best_{i}.json"} for i in range(5)]}
    trained = []

    def train(own, subnet, init_from=None, out="", **_):
        trained.append(subnet)
        (tmp_path / out).mkdir(parents=True)

    monkeypatch.setattr(halving, "train_subnet", train)
    monkeypatch.setattr(halving, "trained_loss", lambda *_: -float(subnets.index(trained[-1])))
    chosen = dataclasses.replace(config.pipeline, finalists=3, halving=steps)
    config = dataclasses.replace(
        config, pipeline=chosen, search=dataclasses.replace(config.search, keep=5)
    )
    finalists = finalists_of(Run(config, tmp_path, SILENT), found)
    assert finalists == (subnets[:1:-1] if steps else subnets[:3])
    assert len(trained) == (10 if steps else 0)  # rounds of 5, 3 and 2


def test_halving_needs_more_than_the_finalists():
    pipeline = PipelineConfig(finalists=3, halving=30)
    with pytest.raises(
        UserError, match=r"search\.keep is 3: .*for finalists=3; use .*keep=6 or mo"
    ):
        RunConfig(pipeline=pipeline, search=SearchConfig(keep=3))


@pytest.mark.parametrize("stored", [{"folder": "subnet/2"}, {"chosen": 1}], ids=["name", "index"])
def test_the_chosen_finalist_is_found(tmp_path, stored):
    """By its folder's name, or by its index in the files of earlier versions."""
    run = Run(tiny_config(), tmp_path, SILENT)
    assert trained_folder(run) == "subnet"
    files.write_json(tmp_path / "subnet/chosen.json", {"version": 1, **stored, "finalists": []})
    assert trained_folder(run) == "subnet/2"


@pytest.mark.slow
def test_search_under_a_measured_limit(prepared, tmp_path):
    """Latency as a share of the largest subnet's, timed, verified, and written down."""
    config = tiny_config(latency_ratio=0.999)
    search = dataclasses.replace(
        config.search,
        population=3, iterations=1, parents=1, mutations=1, crossovers=1, keep=1, latency_runs=21,
    )  # fmt: skip
    # Long enough that another decoder layer takes longer than whatever else the machine does; the
    # kernels are too fast for that with such a small model. So many runs that what the machine does
    # else falls to the 10 % that are dropped at both ends.
    latency = dataclasses.replace(config.latency, target_length=100, runs=41, kernels="xla")
    config = dataclasses.replace(config, search=search, latency=latency)
    run, data, _, params = prepared
    own = dataclasses.replace(run, config=config)
    found = run_search(own, tmp_path / "search", data, params).found
    assert found[0].final is not None
    assert found[0].final.ratio <= 0.999
    result = json.loads((tmp_path / "search" / "result.json").read_text())
    assert result["best"][0]["verified"]["ratio"] <= 0.999
    assert "corrected by" in result["limits"]["latency_ms"]["how"]
    lines = [json.loads(x) for x in (tmp_path / "search/history.jsonl").read_text().splitlines()]
    for line in lines:
        constraint = line["constraints"]["latency_ms"]
        assert 0 < constraint["value"] <= constraint["limit"]
    assert not (tmp_path / "search" / ".timing").exists()


# The others need what stands behind a colon.
SHIPPED = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"supertransformer", "systems"}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_configs_resolve(name):
    config = shipped_config(name)
    config.space.validate(config.space.largest())
    subnet = ROOT / "configs" / f"{name}.json"
    if subnet.exists():
        config.space.validate(subnet_files.load(subnet))


def test_the_small_transformer_has_its_published_recipe():
    """Wu et al., ACL 2021: architecture, and how it is trained."""
    config = shipped_config("multi30k_tiny")
    training, model = config.subnet_training, config.model
    assert (training.schedule, training.peak_rate) == ("inverse_sqrt", 5e-3)
    assert (training.steps, training.warmup_steps) == (8000, 2000)
    assert training.tokens_per_batch * training.batches_per_step == 2 * 4096
    assert (training.final_weights, training.averaged_checkpoints) == ("average", 10)
    assert (model.dropout, training.label_smoothing) == (0.3, 0.1)
    assert (config.tokenizer.vocab_size, config.tokenizer.lowercase) == (10_000, True)
    (subnet,) = {config.space.largest(), config.space.smallest()}
    for _, stack in subnet.stacks:
        assert stack.embed_dim == 128
        assert [layer.experts for layer in stack.layers] == [(256,)] * 4
    assert {layer.heads for layer in subnet.encoder.layers} == {4}


def test_config_mistakes():
    def message(group, field, value):
        config = base()
        with config[group].unlocked(), config[group].ignore_type():
            config[group][field] = value
        with pytest.raises(UserError) as e:
            resolve(config)
        return str(e.value)

    assert "config.training.steps is 'x'" in message("training", "steps", "x")
    assert "config.training.stps is not a field" in message("training", "stps", 1)
    assert "steps is 0" in message("training", "steps", 0)
    assert "distill_choice is 'x'; allowed: best" in message("pipeline", "distill_choice", "x")
    alone = message("pipeline", "distill_n_best", 2)
    assert "distill_n_best 2, but nothing is distilled" in alone
    assert "data.kind is 'x'" in message("data", "kind", "x")
