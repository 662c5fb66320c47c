"""fairseq checkpoints become runs, and come back; what is wrong with one is said in one line."""

import argparse
import dataclasses
import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from bpe_files import ENGLISH, GERMAN, bpe_files
from conftest import elastic_space, layers_of, random_params
from programs import launch, mistake
from published_spaces import SPACE, SPACES

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import from_json
from automoe_jax.config import base, resolve
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.decoding import weight_file
from automoe_jax.decoding.translator import Translator
from automoe_jax.decoding.weights import unpack
from automoe_jax.model.extract import extract
from automoe_jax.phases import convert as conversion
from automoe_jax.phases.convert import convert, write_checkpoint
from automoe_jax.phases.export import export_params
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import Run, open_run
from automoe_jax.phases.search import claim_search
from automoe_jax.phases.train import train_supernet
from automoe_jax.phases.weights import origin, subnet_params, supernet_params
from automoe_jax.published import checkpoint, state_dict, subnet_files, supertransformer
from automoe_jax.published.state_dict import CheckpointError
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training.checkpoints import latest_step
from automoe_jax.training.target import TrainingTarget, abstract_state

IDS = TokenizerConfig(kind="ids")


def config_of(space: SearchSpace, **data) -> Any:
    config = base()
    config.space.update(dataclasses.asdict(space))
    config.data.update(data)
    config.export.beam_sizes = (2,)
    return config


@pytest.fixture(scope="module")
def super_a(shared) -> Path:
    return shared / "fixtures/superA.npz"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_there_and_back(shared):
    for name, space in SPACES.items():
        state = checkpoint.read(shared / f"fixtures/{name}.npz")
        params, ignored = state_dict.to_params(state, space)
        assert ignored == [
            f"{side}.{name}"
            for side in ("decoder", "encoder")
            for name in ("embed_positions._float_tensor", "version")
        ]
        back = state_dict.from_params(params, space)
        same(back, {key: state[key] for key in state.keys() - set(ignored)})


@pytest.mark.parametrize(
    "changes",
    [
        {"share_embeddings": "none", "decoder_embed_dims": (24,)},
        {"share_embeddings": "decoder", "encoder_experts": (1,)},
        {"encoder_placement": (1, 3, 2), "encoder_depths": (3,), "decoder_experts": (1,)},
    ],
    ids=["apart and of other widths", "decoder's own", "placed experts"],
)
def test_random_weights_there_and_back(tmp_path, changes):
    """Layouts that the fixtures do not have: IWSLT's tables, q_proj_weight, single experts."""
    space = elastic_space(**changes)
    params = random_params(space)
    state = state_dict.from_params(params, space)
    for suffix in (".npz", ".safetensors"):
        checkpoint.write(tmp_path / f"x{suffix}", state)
        found, ignored = state_dict.to_params(checkpoint.read(tmp_path / f"x{suffix}"), space)
        same(layers_of(found, space), layers_of(params, space))
        one_expert = "encoder.layers.0.switch_layer.switch.weight"
        assert (one_expert in ignored) == ("encoder_placement" in changes)
    assert ("decoder.embed_out" in state) == (space.share_embeddings == "none")
    cross = layers_of(params, space)["decoder"]["layer_0"]["cross_attention"]
    q, separate = space.qkv_dim, "decoder.layers.0.encoder_attn.k_proj_weight"
    bias = state["decoder.layers.0.encoder_attn.in_proj_bias"]
    for i, name in enumerate(("query", "key", "value")):  # the order of their in_proj
        np.testing.assert_array_equal(bias[i * q : (i + 1) * q], cross[name]["bias"])
    assert (separate in state) == (space.hull().decoder.embed_dim != space.hull().encoder.embed_dim)
    if separate in state:
        for name in ("query", "key", "value"):
            own = state[f"decoder.layers.0.encoder_attn.{name[0]}_proj_weight"]
            np.testing.assert_array_equal(own, cross[name]["kernel"].T)
        table = params["output"]["table"]
        np.testing.assert_array_equal(state["decoder.embed_out"], table)
        assert state[separate].shape == (space.qkv_dim, space.hull().encoder.embed_dim)
        assert state["decoder.embed_out"].shape == (64, 24)


def test_a_shared_table_may_be_stored_once(super_a):
    state = checkpoint.read(super_a)
    params, _ = state_dict.to_params(state, SPACE)
    for name in ("encoder", "decoder"):
        less = {key: x for key, x in state.items() if key != f"{name}.embed_tokens.weight"}
        same(state_dict.to_params(less, SPACE)[0], params)


NORM = "encoder.layers.1.final_layer_norm.bias"
FC1 = "decoder.layers.0.switch_layer.experts.0.0.weight"


@pytest.mark.parametrize(
    ("change", "space", "words"),
    [
        (lambda s: s.pop(NORM), {}, f"it lacks {NORM}"),
        (lambda s: s.update(extra=s[NORM]), {}, "the space has no place for extra"),
        (
            lambda s: s.update({FC1: s[FC1][:48]}),
            {},
            f"{FC1} has the shape (48, 32), the space needs (64, 32); look at "
            "space.decoder_ffn_dims and space.decoder_embed_dims",
        ),
        (lambda s: s.update({NORM: s[NORM] * np.nan}), {}, f"{NORM} has values that are not"),
        (lambda s: s.update({NORM: s[NORM].astype(int)}), {}, f"{NORM} is of type int64"),
        (lambda s: None, {"encoder_experts": (1, 2)}, "its encoder has 3 expert(s) per layer"),
        (lambda s: None, {"decoder_depths": (1, 2)}, "it has 3 decoder layers"),
        (lambda s: None, {"encoder_embed_dims": (16,)}, "its encoder is 32 wide"),
        (lambda s: None, {"share_embeddings": "none"}, "share_embeddings=all"),
        (lambda s: s.update({"decoder.embed_out": s[NORM]}), {}, "share_embeddings=none"),
        (
            lambda s: s.update({state_dict.TARGET: 2 * s[state_dict.SOURCE]}),
            {},
            "share_embeddings=decoder",
        ),
        (lambda s: s.clear(), {}, "is this the state dict of a fairseq model?"),
        (
            lambda s: s.pop("encoder.embed_tokens.weight"),
            {"share_embeddings": "decoder"},
            "it lacks encoder.embed_tokens.weight",
        ),
        (
            lambda s: s.update({NORM: np.full(32, 1e300)}),
            {},
            f"{NORM} has values that are not finite",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_weights(super_a, change, space, words):
    state = checkpoint.read(super_a)
    change(state)
    with pytest.raises(CheckpointError) as e:
        state_dict.to_params(state, dataclasses.replace(SPACE, **space))
    assert words in str(e.value)
    assert "\n" not in str(e.value)


class Harmful:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


def write_object_array(path: Path):
    np.savez(path, a=np.array([Harmful(path.parent / "mark")], dtype=object))


def write_pickle(path: Path):
    path.write_bytes(b"\x80\x04" + b"not a zip archive" * 10)


def write_member(path: Path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("encoder.embed_tokens.weight", b"no array")


def truncate(path: Path, source: Path, keep: float):
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("a.npz", lambda p, s: truncate(p, s, 0.6), "is damaged or not a .npz file"),
        ("a.npz", lambda p, s: write_pickle(p), "is damaged or not a .npz file"),
        ("a.npz", lambda p, s: write_object_array(p), "reading it could run code"),
        ("a.safetensors", lambda p, s: truncate(p, s, 0.5), "is damaged or not a .safetensors"),
        ("a.npz", lambda p, s: write_member(p), "encoder.embed_tokens.weight is no array"),
        ("a.txt", lambda p, s: p.write_text("x"), "must end in .npz, .safetensors, .pt"),
        ("a.npz", lambda p, s: p.mkdir(), "is a folder; give a file"),
        ("a.npz", lambda p, s: None, "does not exist; give a file"),
    ],
)
def test_what_is_wrong_with_the_file(tmp_path, super_a, name, make, words):
    make(tmp_path / name, super_a)
    with pytest.raises(UserError) as e:
        checkpoint.read(tmp_path / name)
    assert words in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "mark").exists()


def test_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="needs PyTorch, which is not installed"):
        checkpoint.read(tmp_path / "a.pt")


def test_pytorch_files(tmp_path, super_a, monkeypatch):
    """A state dict, a fairseq checkpoint with its options, and one that would run code."""
    torch = pytest.importorskip("torch")
    state = checkpoint.read(super_a)
    tensors = {key: torch.from_numpy(x.copy()) for key, x in state.items()}
    torch.save(tensors, tmp_path / "plain.pt")
    options = argparse.Namespace(arch="transformersuper_wmt_en_de", lr=[1e-7])
    half = {key: x.half() for key, x in tensors.items() if "_float_tensor" not in key}
    # Their trainer keeps meters too, objects of a package that is not here.
    module = types.ModuleType("fairseq.meters")
    module.AverageMeter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.meters", module)
    meter = module.AverageMeter()
    meter.sum, meter.count = 3.0, 2
    extra = {"epoch": 3, "val_loss": 4.0, "train_meters": {"train_loss": meter}}
    torch.save({"args": options, "model": half, "extra_state": extra}, tmp_path / "fairseq.pt")
    monkeypatch.undo()
    same(checkpoint.read(tmp_path / "plain.pt"), state)
    found = checkpoint.read(tmp_path / "fairseq.pt")
    same(found, {key: state[key].astype(np.float16).astype(np.float32) for key in half})
    mark = tmp_path / "mark"
    torch.save({"model": tensors, "args": Harmful(mark)}, tmp_path / "harmful.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    truncate(tmp_path / "short.pt", tmp_path / "plain.pt", 0.5)
    for name, words in (
        ("harmful", "reading it could run code"),
        ("list", "is not a state dict"),
        ("short", "is damaged or not a .pt file"),
    ):
        with pytest.raises(UserError) as e:
            checkpoint.read(tmp_path / f"{name}.pt")
        assert words in str(e.value)
        assert "\n" not in str(e.value)
    assert not mark.exists()


# --- runs ----------------------------------------------------------------------------------------


def test_supernet_and_subnet(tmp_path, shared, super_a):
    """Both forms hold the published weights; the export of a subnet holds that subnet alone."""
    config = resolve(config_of(SPACE))
    whole, sub = (Run(config, tmp_path / name, Silent()) for name in ("super", "sub"))
    convert(whole, super_a, IDS)
    params, step = supernet_params(whole, (64, 64))
    published, _ = state_dict.to_params(checkpoint.read(super_a), SPACE)
    same(params, published)
    assert step == 0
    write_checkpoint(whole, tmp_path / "back.safetensors")
    state = checkpoint.read(super_a)
    back = checkpoint.read(tmp_path / "back.safetensors")
    same(back, {key: state[key] for key in back})

    info = json.loads((shared / "fixtures/A06_frac_dec2.json").read_text())
    subnet = from_json(info["subnet"], 32)
    convert(sub, super_a, IDS, subnet)
    own, found, _ = subnet_params(sub)
    assert found == subnet
    same(own, extract(published, subnet, SPACE.hull()))
    words = origin(sub.path / "subnet", "trained subnet", 0)
    assert words == "trained subnet, converted from superA.npz"
    export_params(sub, own, subnet, tmp_path / "export", words)
    translator = Translator.load(tmp_path / "export")
    (translation,) = translator.translate(["5 6 7 8 2"], max_length=6)
    assert translation.hypotheses[0].ids == tuple(map(int, translation.text.split()))
    used = sum(x.size for x in jax.tree.leaves(own))
    words = translator.manifest["vocab_sizes"][1]
    packed = weight_file.load(tmp_path / "export/weights.safetensors")
    stored = sum(
        w.size for w in unpack(packed, words).values()
    )  # without what panels are padded by
    # No more than the subnet's weights, with the output layer where the table is wider than it.
    assert used <= stored <= used + 64 * subnet.decoder.embed_dim
    with pytest.raises(UserError, match=r"back\.safetensors exists; name a new file"):
        write_checkpoint(whole, tmp_path / "back.safetensors")
    with pytest.raises(UserError, match="holds a subnet and no supernet"):
        write_checkpoint(sub, tmp_path / "none.npz")
    with pytest.raises(UserError, match="has converted weights and no corpus; name one"):
        prepare(sub)
    with pytest.raises(UserError, match="has weights already; name a new --workdir"):
        convert(sub, super_a, IDS, subnet)


def test_a_killed_conversion(tmp_path, super_a, monkeypatch):
    """Nothing is trained on what is not there; the same command again makes it whole."""
    run = Run(resolve(config_of(SPACE)), tmp_path / "run", Silent())
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "Checkpoints", None)
        with pytest.raises(TypeError):
            convert(run, super_a, IDS)
    with pytest.raises(UserError, match=r"did not finish; run launch/convert\.py again"):
        train_supernet(run)
    convert(run, super_a, IDS)
    assert latest_step(tmp_path / "run/supernet") == 0


def test_a_chosen_finalist_is_not_shadowed(tmp_path, super_a, shared):
    (tmp_path / "run/subnet").mkdir(parents=True)
    (tmp_path / "run/subnet/chosen.json").write_text("{}")
    info = json.loads((shared / "fixtures/A06_frac_dec2.json").read_text())
    subnet = from_json(info["subnet"], 32)
    with pytest.raises(UserError, match="has weights already"):
        convert(Run(resolve(config_of(SPACE)), tmp_path / "run", Silent()), super_a, IDS, subnet)


def test_random_and_converted_are_different_searches(tmp_path):
    run = Run(resolve(config_of(SPACE)), tmp_path, Silent())
    claim_search(run, tmp_path / "search", None)
    (tmp_path / "search/history.jsonl").write_text("")
    with pytest.raises(UserError, match="supernet_step is None there and 0 here"):
        claim_search(run, tmp_path / "search", 0)


def write_ids(folder: Path, n: int):
    """Parallel text of token ids: the target is the source."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split in ("train", "valid"):
        lines = [" ".join(map(str, rng.integers(4, 64, rng.integers(2, 9)))) for _ in range(n)]
        for language in ("en", "de"):
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_training_goes_on_from_converted_weights(tmp_path, super_a):
    """The corpus may be named later; a rate of nothing leaves the weights as they came."""
    convert(Run(resolve(config_of(SPACE)), tmp_path / "run", Silent()), super_a, IDS)
    write_ids(tmp_path / "text", 40)
    later = config_of(SPACE, kind="parallel_text", path=str(tmp_path / "text"))
    training = later.training
    training.update(steps=2, warmup_steps=0, peak_rate=1e-20, initial_rate=1e-20, final_rate=1e-20)
    training.update(tokens_per_batch=64, batches_per_step=jax.device_count(), buckets=1)
    training.update(eval_every=0, eval_subnets=0)
    run = open_run(resolve(later), tmp_path / "run", Silent())
    before, _ = supernet_params(run, (64, 64))
    train_supernet(run)
    after, step = supernet_params(run, (64, 64))
    assert step == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, before)
    assert origin(run.supernet, "supernet", step).endswith("trained on to step 2")
    metrics = (run.supernet / "metrics.jsonl").read_text().splitlines()
    losses = [x["value"] for x in map(json.loads, metrics) if x["name"] == "valid/loss_largest"]
    published_loss = 135 / 26  # of the fixtures' batches: about 5.2 nats a token
    assert losses[-1] == pytest.approx(published_loss, rel=0.3)
    changed = config_of(SPACE, kind="parallel_text", path=str(tmp_path))
    with pytest.raises(UserError, match=r"was made with another config: data\.path"):
        open_run(resolve(changed), tmp_path / "run", Silent())


def test_programs(tmp_path):
    """IWSLT's kind of model, from raw text to a score: three tables, two dictionaries."""
    codes, english, german = bpe_files(tmp_path, lowercase=True)
    made = TokenizerConfig(kind="bpe", dictionaries=(str(english), str(german)), bpe_codes="x")
    sizes = tokenizers.vocab_sizes(made)
    assert sizes[0] != sizes[1]
    space = elastic_space(
        share_embeddings="none", encoder_experts=(1,), decoder_experts=(1,),
        identity_experts=False, encoder_top_k=(1,), decoder_top_k=(1,),
    )  # fmt: skip
    what = TrainingTarget(space, sizes, resolve(base()).model)
    abstract = abstract_state(what, resolve(base()).training, 0).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5), abstract)
    checkpoint.write(tmp_path / "iwslt.npz", state_dict.from_params(params, space))
    files.write_text(tmp_path / "space.yml", supertransformer.dump(space))
    subnet_files.save(space.smallest(), tmp_path / "sub.yml")
    flags = [
        f"--config=configs/supertransformer.py:{tmp_path}/space.yml",
        f"--workdir={tmp_path}/run", "--config.export.beam_sizes=2,",
    ]  # fmt: skip
    command = [*flags, f"--checkpoint={tmp_path}/iwslt.npz", f"--subnet={tmp_path}/sub.yml"]
    text = [f"--dict={english},{german}", f"--bpe_codes={codes}", "--lowercase"]

    assert "give --dict and --bpe_codes, or --tokenizer=ids" in mistake("convert", *command)
    assert "needs --dict and --bpe_codes together" in mistake("convert", *command, text[0])
    swapped = [f"--dict={german},{english}", *text[1:]]
    line = mistake("convert", *command, *swapped)
    assert f"has {sizes[1]} and {sizes[0]} entries for source and target" in line
    wrong = [*command, "--config.space.encoder_depths=1,2"]
    assert "it has 3 encoder layers" in mistake("convert", *wrong, *text)
    assert not (tmp_path / "run").exists()

    done = launch("convert", *command, *text)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("subnet converted: ")
    assert "text: bpe, en to de; Moses does not split compounds" in done.stderr.decode()
    done = launch("export", *flags)
    assert done.returncode == 0, done.stderr.decode()
    (tmp_path / "a.en").write_text("\n".join(ENGLISH) + "\n")
    (tmp_path / "a.de").write_text("\n".join(GERMAN) + "\n")
    done = launch(
        "evaluate", f"--export={tmp_path}/run/export", f"--source={tmp_path}/a.en",
        f"--reference={tmp_path}/a.de", f"--output={tmp_path}/out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    scores = json.loads(done.stdout)
    assert 0 <= scores["tokenized_bleu"] < 50
    assert scores["tokenized_bleu_signature"].endswith("|compounds:split")
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 2
    assert all(line and line == line.lower() for line in lines)
    assert "@@" not in lines[0]
