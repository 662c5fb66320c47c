"""The phases of a run, each from the files of those before it to its own folder."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from automoe_jax.architecture.subnet import Subnet, from_json, to_json
from automoe_jax.config import RunConfig
from automoe_jax.data import lexicon, tokens
from automoe_jax.data.config import DataConfig
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.decoding import evaluation as evaluate
from automoe_jax.decoding.export import export, random_params
from automoe_jax.decoding.xla_engine import Spec
from automoe_jax.latency.kernels import kernels_used
from automoe_jax.latency.records import HISTORY, MEASUREMENTS
from automoe_jax.model.extract import Params, extract
from automoe_jax.phases import prepare
from automoe_jax.predictor import fit as predictor
from automoe_jax.predictor import model as predictor_model
from automoe_jax.predictor.model import LatencyModel
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress
from automoe_jax.training import loop
from automoe_jax.training.loop import TrainingTarget

SUPERNET, SUBNET, SEARCH, EXPORT = "supernet", "subnet", "search", "export"
CHOSEN = "chosen.json"  # in subnet/, which finalist the pipeline keeps
CACHE = ".jax_cache"  # compiled programs
LATENCY_MODEL, LATENCY_MEASUREMENTS = "latency_model.json", "latency measurements"
# Sentences kept in an export for benchmarking on real text.
N_SAMPLES = 32


def open_run(config: RunConfig, folder: str | Path) -> Path:
    """Starts or continues a workdir; `UserError` where it belongs to another config."""
    path = workdir.resolve(folder)
    common = config.groups("seed", "data", "tokenizer")
    # A tokenizer that came with converted weights says nothing of the corpus or of this config.
    begun = (path / "tokenizer").exists()
    if not (path / "tokens").is_dir() and is_converted(path):
        begun = False
        stored = workdir.read(path, "run")["config"]["data"]
        if not workdir.same(stored, config.data) and jax.process_index() == 0:
            shutil.rmtree(path / "corpus", ignore_errors=True)  # of another text
    _claim(path, "run", common, begun)
    return path


def is_converted(run: Path) -> bool:
    """Whether a run began with converted weights; see `conversion`."""
    manifest = run / workdir.MANIFEST
    return manifest.exists() and workdir.CONVERTED in workdir.read(run, "run")


def check_corpus(data: DataConfig, run: Path):
    """Raises `UserError` where a model that came from elsewhere would be given our own phrases."""
    if data.kind == "phrases" and is_converted(run):
        raise UserError(
            f"{run} has converted weights and no corpus; name one, as "
            "--config.data.kind=parallel_text --config.data.path=DIR"
        )


def _claim(folder: Path, kind: str, content: dict[str, Any], begun: bool):
    """`workdir.claim` by the first process; the others wait for it."""
    if jax.process_index() == 0:
        workdir.claim(folder, kind, content, begun)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"claim {folder}")


def prepare_run(
    config: RunConfig, run: Path, progress: Progress, init_from: Path | None = None
) -> prepare.PreparedData:
    """Corpus, tokenizer and token ids.

    Args:
      config: of the run.
      run: workdir.
      progress: told of it.
      init_from: a run whose tokenizer is taken over, because its weights will be.
    """
    check_corpus(config.data, run)
    tokenizer = None if init_from is None else init_from / "tokenizer"
    return prepare.prepare(config.data, config.tokenizer, run, progress, tokenizer)


def claim_search(config: RunConfig, folder: Path, step: int | None):
    """Starts or continues a search; refuses another config or another supernet.

    Args:
      config: of the run.
      folder: of the search.
      step: of the supernet; None for random weights.
    """
    about = {
        **config.groups("seed", "data", "tokenizer", "space", "search", "predictor", "latency"),
        # What is timed, and how large it is, follows from these.
        "quantize": config.export.quantize,
        "shortlist": config.export.shortlist,
        "supernet_step": step,
    }
    scored, measured = ((folder / name).exists() for name in (HISTORY, MEASUREMENTS))
    try:
        workdir.claim(folder, SEARCH, about, scored or measured)
    except UserError:
        if scored:
            raise
        (folder / MEASUREMENTS).unlink()  # of a search that came to nothing
        workdir.claim(folder, SEARCH, about, False)


def trained(
    config: RunConfig, vocab_sizes: tuple[int, int], subnet: Subnet | None = None
) -> TrainingTarget:
    return TrainingTarget(config.space, vocab_sizes, config.model, subnet)


def train_supernet(config: RunConfig, run: Path, progress: Progress):
    """Trains the supernet in `supernet/`, from where it stands."""
    groups = ("seed", "data", "tokenizer", "space", "model", "training", "sampling")
    folder = run / SUPERNET
    step = loop.latest_step(folder)
    _check_finished(folder, SUPERNET, step)
    if step == 0:  # converted weights: nothing has been trained yet, but the space is theirs
        _check_space(config, folder, SUPERNET)
    _claim(folder, SUPERNET, config.groups(*groups), bool(step))
    data = prepare_run(config, run, progress)
    loop.train(
        trained(config, data.tokenizer.vocab_sizes),
        config.training,
        config.sampling,
        config.seed,
        data,
        folder,
        progress,
    )
    _forget_compiled()


def train_subnet(
    config: RunConfig,
    run: Path,
    subnet: Subnet,
    progress: Progress,
    init_from: Path | None = None,
    out: str = SUBNET,
):
    """Trains one architecture in `out/`.

    Args:
      config: of the run; its group `subnet_training` is used.
      run: workdir.
      subnet: must be in the space.
      progress: told of it.
      init_from: a run whose supernet's weights are inherited; None for fresh ones.
      out: folder in the workdir.
    """
    config.space.validate(subnet)
    groups = ("seed", "data", "tokenizer", "space", "model", "subnet_training")
    about = {
        **config.groups(*groups),
        "subnet": to_json(subnet),
        # Its own supernet by a name that stays true when the run is moved.
        "init_from": None if init_from is None else "." if init_from == run else str(init_from),
    }
    step = loop.latest_step(run / out)
    _check_finished(run / out, SUBNET, step)
    begun = step is not None
    if step == 0:
        if init_from is not None:
            raise UserError(
                f"{run / out} holds converted weights to start from; leave --init_from out, or "
                "name another folder with --out"
            )
        _check_subnet(_check_space(config, run / out, SUBNET), subnet, run / out)
    _claim(run / out, SUBNET, about, bool(step))
    data = prepare_run(config, run, progress, init_from)
    what = trained(config, data.tokenizer.vocab_sizes, subnet)
    params = None
    if init_from is not None and not begun:
        params, step = supernet_params(config, init_from, data.tokenizer.vocab_sizes)
        progress.note(f"weights inherited from {init_from / SUPERNET} at step {step:,}")
        params = extract(params, subnet, what.hull)
    loop.train(
        what,
        config.subnet_training,
        config.sampling,
        config.seed,
        data,
        run / out,
        progress,
        params,
    )
    _forget_compiled()


def _forget_compiled():
    """Lets go of compiled code: one training takes thousands of memory mappings, and a process may
    have 65,530 in all.
    """
    jax.clear_caches()


def _check_space(config: RunConfig, folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of what was trained; `UserError` where its space is not this config's."""
    manifest = workdir.read(folder, kind)
    theirs = workdir.with_defaults(manifest["config"]["space"], config.space)
    ours = dataclasses.asdict(config.space)
    for name, given in ours.items():
        value = list(given) if isinstance(given, tuple) else given
        if theirs.get(name) != value:
            raise UserError(
                f"{folder} was trained with another space: space.{name} is {theirs.get(name)} "
                f"there and {value} here; use the same config"
            )
    return manifest


def _check_finished(folder: Path, kind: str, step: int | None):
    """Refuses a folder whose conversion was killed: nothing of it would be in what is trained."""
    if step is not None or not (folder / workdir.MANIFEST).exists():
        return
    if workdir.CONVERTED in workdir.read(folder, kind):
        raise UserError(f"the conversion to {folder} did not finish; run launch/convert.py again")


def _check_subnet(manifest: dict[str, Any], subnet: Subnet, folder: Path):
    if from_json(manifest["config"]["subnet"]) != subnet:
        raise UserError(f"{folder} holds another subnet; name another folder with --out")


def origin(folder: Path, what: str, step: int) -> str:
    """Where the weights in a folder come from, in words."""
    source = workdir.read(folder, SUPERNET if folder.name == SUPERNET else SUBNET).get(
        workdir.CONVERTED
    )
    if source is None:
        return f"{what}, step {step}"
    trained_on = f", trained on to step {step}" if step else ""
    return f"{what}, converted from {source['checkpoint']}{trained_on}"


def supernet_params(
    config: RunConfig, run: Path, vocab_sizes: tuple[int, int]
) -> tuple[Params, int]:
    """The newest weights of a run's supernet, and their step."""
    if loop.latest_step(run / SUPERNET) is not None:
        _check_space(config, run / SUPERNET, SUPERNET)
    elif (run / SUBNET / workdir.MANIFEST).exists():
        raise UserError(
            f"{run} holds a subnet and no supernet; leave --subnet out to use the subnet"
        )
    return loop.load_params(trained(config, vocab_sizes), config.training, run / SUPERNET)


def trained_folder(run: Path) -> str:
    """Where the run's trained subnet is: `subnet/`, or the finalist that the pipeline chose."""
    choice = run / SUBNET / CHOSEN
    if (run / SUBNET / workdir.MANIFEST).exists() or not choice.exists():
        return SUBNET
    return f"{SUBNET}/{files.read_json(choice, 'choice')['chosen'] + 1}"


def subnet_params(config: RunConfig, run: Path, out: str = SUBNET) -> tuple[Params, Subnet, int]:
    """The newest weights of a trained subnet, its architecture, and their step."""
    folder = run / out
    if not (folder / workdir.MANIFEST).exists():
        raise UserError(
            f"{folder} has no trained subnet; train one with launch/train.py --subnet, or give "
            "--subnet=FILE to export one with the supernet's weights"
        )
    manifest = _check_space(config, folder, SUBNET)
    subnet = from_json(manifest["config"]["subnet"])
    vocab_sizes = tokenizers.load(run / "tokenizer").vocab_sizes
    what = trained(config, vocab_sizes, subnet)
    params, step = loop.load_params(what, config.subnet_training, folder)
    return params, subnet, step


def spec(config: RunConfig, subnet: Subnet) -> Spec:
    hull = config.space.hull()
    return Spec(subnet, hull.encoder.embed_dim, hull.decoder.embed_dim)


def export_params(
    config: RunConfig,
    run: Path,
    params: Params,
    subnet: Subnet,
    folder: Path,
    origin: str,
):
    """Exports weights of a run with its tokenizer and some of its sentences."""
    samples: list[str] = []
    if (run / "tokens").is_dir():  # converted weights can be exported without a corpus
        valid = prepare.corpus_split(config.data, run, "valid")
        samples, _ = evaluate.read_split(valid, N_SAMPLES)
    translations = None
    if config.export.shortlist:
        if not (run / "tokens" / "train").is_dir():
            raise UserError(f"{run} has no training text to count a shortlist from; leave it out")
        vocab_sizes = tokenizers.load(run / "tokenizer").vocab_sizes
        pairs = tokens.load(run / "tokens" / "train")
        translations = lexicon.build(pairs, *vocab_sizes, config.export.shortlist)
    export(
        params,
        spec(config, subnet),
        config.export,
        folder,
        origin,
        run / "tokenizer",
        (config.data.source_lang, config.data.target_lang),
        samples,
        config.groups(*(field.name for field in dataclasses.fields(config))),
        lexicon=translations,
    )


def random_weights(
    config: RunConfig, vocab_sizes: tuple[int, int], subnet: Subnet | None = None
) -> Params:
    """Weights that nobody has trained, of the supernet or of a subnet: for timing only."""
    what = trained(config, vocab_sizes, subnet)
    return random_params(
        loop.abstract_state(what, config.training, config.seed).params, config.seed
    )


def export_random(config: RunConfig, subnet: Subnet, folder: Path, vocab_sizes: tuple[int, int]):
    """Exports an architecture with random weights and no tokenizer: for timing only."""
    params = random_weights(config, vocab_sizes, subnet)
    export(params, spec(config, subnet), config.export, folder, "random")


def latency_model(
    config: RunConfig,
    run: Path,
    inherited: "SupernetExporter",
    vocab_sizes: tuple[int, int],
    progress: Progress,
) -> LatencyModel:
    """The latency model that a config names, or the run's, made now where it is missing.

    Raises:
      UserError: it is of another protocol than the config's.
    """
    latency, quantize = config.latency, config.export.quantize
    path = Path(config.search.latency_model or run / LATENCY_MODEL)
    task = predictor.task_of(latency, vocab_sizes[1], quantize)
    if not path.exists() and not config.search.latency_model:
        fit_latency_model(config, run, inherited, vocab_sizes, path, progress)
    model = predictor_model.load(path)
    for line in model.strange(predictor.made_for(latency)):
        progress.note(f"warning: {line}")
    same = None if model.task is None else dataclasses.replace(model.task, cache_bytes=0)
    if same not in (None, dataclasses.replace(task, cache_bytes=0)):
        raise UserError(
            f"{path} is a latency model of {same}, and the config asks for {task}; fit another "
            "one with launch/fit_latency.py"
        )
    progress.note(f"latency model {path}: {model.how}")
    return model


def fit_latency_model(
    config: RunConfig,
    run: Path,
    inherited: "SupernetExporter",
    vocab_sizes: tuple[int, int],
    path: Path,
    progress: Progress,
) -> LatencyModel:
    """Times subnets, fits a model and writes it.

    Goes on from what a start that was killed has timed. Where there is a model, all is timed anew.
    """
    folder = path.with_suffix(".measurements")
    if path.exists():
        shutil.rmtree(folder, ignore_errors=True)
    task = predictor.task_of(config.latency, vocab_sizes[1], config.export.quantize)
    about = {
        **config.groups("space", "latency", "predictor", "seed"),
        "task": dataclasses.asdict(task),
        "made_for": predictor.made_for(config.latency),
    }
    workdir.claim(folder, LATENCY_MEASUREMENTS, about, (folder / MEASUREMENTS).exists())
    count = config.predictor.subnets + config.predictor.held_out
    progress.note(f"making a latency model of this machine: {count} subnets are timed")
    model = predictor.fit(
        config.space,
        config.latency,
        config.predictor,
        task,
        inherited.export_for_timing,
        folder,
        progress,
        config.seed,
    )
    model.save(path)
    return model


class SupernetExporter:
    """Exports subnets with the supernet's weights, for timing and comparing."""

    def __init__(self, config: RunConfig, run: Path, params: Params, origin: str):
        self._config, self._run, self._params, self._origin = config, run, params, origin

    def params(self, subnet: Subnet) -> Params:
        """Weights of a subnet, as NumPy."""
        own = extract(self._params, subnet, self._config.space.hull())
        return jax.tree.map(np.asarray, own)

    def export(self, subnet: Subnet, folder: Path, beam_sizes: Sequence[int] = ()):
        """A whole export; `beam_sizes` in place of the config's where given."""
        config = self._config
        if beam_sizes:
            programs = dataclasses.replace(config.export, beam_sizes=tuple(beam_sizes))
            config = dataclasses.replace(config, export=programs)
        export_params(config, self._run, self.params(subnet), subnet, folder, self._origin)

    def export_for_timing(self, subnet: Subnet, folder: Path, beam_size: int):
        """The program of one beam size and the weights; no tokenizer."""
        config = self._config
        programs = dataclasses.replace(config.export, beam_sizes=(beam_size,))
        own = spec(config, subnet)
        # Only the program that will be timed: a search writes hundreds of exports.
        kernels = (kernels_used(config.latency),)
        export(self.params(subnet), own, programs, folder, self._origin, kernels=kernels)
