"""A trained model that another one learns from: of a workdir, or an export."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from automoe_jax import config as settings
from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.decoding import weight_file
from automoe_jax.decoding.manifest import KIND, WEIGHTS, read_manifest
from automoe_jax.decoding.weights import params_of, unpack
from automoe_jax.model.extract import Params, inherited
from automoe_jax.model.scales import Scales, scales_of
from automoe_jax.model.stand_alone import stand_alone
from automoe_jax.phases import weights
from automoe_jax.phases.run import SUBNET, SUPERNET, Run
from automoe_jax.phases.weights import subnet_params, supernet_params, trained_folder
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress, Silent
from automoe_jax.training.checkpoints import final_step
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.steps import TrainedTeacher


class _Source(NamedTuple):
    """A teacher's architecture and weights, and what its weights mean."""

    subnet: Subnet
    params: Params
    base_dims: tuple[int, int]
    scales: Scales
    words: str  # where they come from
    tokenizer: Path


def home(path: Path) -> Path:
    """The workdir or export of a teacher, which has its tokenizer; `UserError` if it is neither."""
    path = path.parent if path.name == SUPERNET else path
    if not (path / workdir.MANIFEST).exists():
        raise UserError(
            f"the teacher {path} is neither a workdir nor an export; give one of them, or "
            f"WORKDIR/{SUPERNET}"
        )
    return path


def origin(path: Path) -> str:
    """Where a teacher's weights come from, with their step; reads none.

    Raises `UserError` if the folder is neither an export nor a workdir with a trained model.
    """
    if _is_export(path):
        return read_manifest(path)["weights_from"]
    model = _model_in(path)
    return model.words(model.step)


def load(path: Path, tokenizer: Tokenizer, progress: Progress) -> TrainedTeacher:
    """The teacher in a folder: an export, or a workdir.

    Of a workdir it is the trained subnet, or the largest subnet of the supernet where there is no
    other or the path ends in `supernet`. Raises `UserError` if the folder is neither, or the
    teacher has another tokenizer than the student's.
    """
    source = _of_export(path) if _is_export(path) else _of_workdir(path, progress)
    if tokenizers.load(source.tokenizer).content != tokenizer.content:
        raise UserError(
            f"the teacher {path} has another tokenizer than the model that learns from it; give "
            "the model a new workdir, which takes the teacher's tokenizer"
        )
    progress.note(f"teacher: {path} ({source.words})")
    return _trained(source, tokenizer.vocab_sizes)


def _is_export(path: Path) -> bool:
    return files.read_json(home(path) / workdir.MANIFEST, "manifest").get("kind") == KIND


def model_of_export(path: Path) -> TrainedTeacher:
    """The stand-alone model in an export with a tokenizer, and its weights."""
    return _trained(_of_export(path), read_manifest(path)["vocab_sizes"])


def _trained(source: _Source, vocab_sizes: Sequence[int]) -> TrainedTeacher:
    names = {"embedding": "all", "output": "none"}
    sharing = next((kind for name, kind in names.items() if name in source.params), "decoder")
    first, second = vocab_sizes
    module = stand_alone(
        source.subnet, (first, second), source.base_dims, share_embeddings=sharing,
        scales=source.scales,
    )  # fmt: skip
    return TrainedTeacher(module, source.params)


def _of_export(path: Path) -> _Source:
    manifest = read_manifest(path)
    subnet = from_json(manifest["subnet"])
    arrays = unpack(weight_file.load(path / WEIGHTS), manifest["vocab_sizes"][1])
    tokenizer = path / "tokenizer"
    if not tokenizer.is_dir():
        raise UserError(f"the export {path} has no tokenizer, so nothing says what its ids mean")
    first, second = manifest["base_dims"]
    scales = Scales(gate=manifest["gate"])  # others are in its weights
    words = manifest["weights_from"]
    return _Source(subnet, params_of(arrays, subnet), (first, second), scales, words, tokenizer)


class _Model(NamedTuple):
    """The model of a workdir that teaches."""

    folder: Path  # in the workdir
    config: settings.RunConfig  # of the workdir, with the settings of this training
    training: TrainingConfig
    step: int

    @property
    def of_supernet(self) -> bool:
        return self.folder.name == SUPERNET

    def words(self, step: int) -> str:
        """Where its weights of a step come from."""
        name = "largest subnet of the supernet" if self.of_supernet else "trained subnet"
        words = weights.origin(self.folder, name, step, self.training.final_weights)
        average = self.training.final_weights == "average"
        return f"{words} ({self.training.averaged_checkpoints})" if average else words


def _model_in(path: Path) -> _Model:
    of_supernet, path = path.name == SUPERNET, home(path)
    groups = workdir.settings(path, "run")
    trained = trained_folder(Run(settings.from_stored(groups), path, Silent()))
    if of_supernet or not (path / trained / workdir.MANIFEST).exists():
        trained = SUPERNET
    folder, kind = path / trained, SUPERNET if trained == SUPERNET else SUBNET
    if (folder / workdir.MANIFEST).exists():
        groups |= workdir.settings(folder, kind)
    config = settings.from_stored(groups)
    training = config.training if kind == SUPERNET else config.subnet_training
    step = final_step(folder, training)
    if step is None:
        raise UserError(f"the workdir {path} has no trained model to learn from; train one first")
    return _Model(folder, config, training, step)


def _of_workdir(path: Path, progress: Progress) -> _Source:
    model, path = _model_in(path), home(path)
    run = Run(model.config, path, progress)
    space = run.config.space
    if model.of_supernet:
        params, step = supernet_params(run, tokenizers.load(run.tokenizer).vocab_sizes)
        subnet = space.largest()
        params = inherited(params, subnet, space)
    else:
        params, subnet, step = subnet_params(run, run.stored(model.folder))
    base_dims = space.hull().encoder.embed_dim, space.hull().decoder.embed_dim
    words = model.words(step)
    return _Source(subnet, params, base_dims, scales_of(space), words, run.tokenizer)
