"""Converts a fairseq checkpoint to a run: weights in `supernet/` or `subnet/`, and a tokenizer."""

import dataclasses
import tempfile
from pathlib import Path

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.config import RunConfig
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers import token_ids
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.data.tokenizers.fairseq_bpe import FairseqBpe
from automoe_jax.model.extract import Params, extract, with_scales
from automoe_jax.model.scales import Scales, scales_of
from automoe_jax.phases.prepare import make_tokenizer, vocab_sizes
from automoe_jax.phases.run import SUBNET, SUPERNET, Run, hold, open_run
from automoe_jax.phases.train import settings
from automoe_jax.phases.weights import supernet_params, target
from automoe_jax.published import checkpoint, state_dict
from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError
from automoe_jax.training.checkpoints import CHECKPOINTS, Checkpoints, latest_step
from automoe_jax.training.target import abstract_state, check_shapes


def convert(
    run: Run, source: Path, tokenizer: TokenizerConfig | None, subnet: Subnet | None = None
) -> Path:
    """Reads a checkpoint, writes it as a run that the other phases continue; returns its folder.

    Writes nothing if anything is wrong with the checkpoint or the tokenizer. The run need not
    exist; the checkpoint must be a supernet of its config's space. Of a supernet in which only
    `subnet` was trained, only the weights of that subnet are kept. Without `tokenizer` the run
    must have one; kind "ids" takes its sizes from the checkpoint.

    Raises:
      UserError: the checkpoint cannot be read, is of another space or vocabulary, or the folder
        has weights already.
    """
    config, kind = run.config, SUPERNET if subnet is None else SUBNET
    if subnet is not None:
        config.space.validate(subnet)
    folder = run.path / kind
    begun = (run.path / workdir.MANIFEST).exists()
    if begun:
        open_run(config, run.path, run.progress)
    _check_empty(folder)
    state = checkpoint.read(source)
    params, sizes, ignored = _to_params(state, config, subnet, source)
    text = _make_tokenizer(run, tokenizer, sizes)
    names = ", ".join(ignored) or "none"
    run.progress.note(f"{source}: {len(state) - len(ignored)} arrays used; ignored: {names}")
    run.progress.note(f"text: {text}")
    hold(run)
    origin = {workdir.CONVERTED: {"checkpoint": source.name, "text": text}}
    if not begun:
        common = config.groups("seed", "data", "tokenizer")
        workdir.write(run.path, "run", {"config": common, **origin})
    workdir.write(folder, kind, {"config": settings(config, subnet, None), **origin})
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    checkpoints.save_params(params, 0)
    checkpoints.close()
    return folder


def _check_empty(folder: Path):
    """Refuses a folder that has weights; a killed conversion may have left its manifest."""
    others = {x.name for x in folder.iterdir()} if folder.is_dir() else set()
    others -= {workdir.MANIFEST, CHECKPOINTS}
    if latest_step(folder) is not None or others:
        raise UserError(f"{folder} has weights already; name a new --workdir")


def _check_published(space: SearchSpace):
    """Refuses a space whose weights mean something else than those of a published checkpoint."""
    published = SearchSpace()
    for name in ("gate", "sharing", "cell"):
        if (given := getattr(space, name)) != (theirs := getattr(published, name)):
            raise UserError(
                f"space.{name} is {given!r}, but fairseq checkpoints have {theirs!r}: a run with "
                f"--config.space.{name}={theirs} can be converted"
            )


def _to_params(
    state: state_dict.State, config: RunConfig, subnet: Subnet | None, source: Path
) -> tuple[Params, tuple[int, int], list[str]]:
    """Weights, vocabulary sizes of source and target, and the names of ignored arrays."""
    _check_published(config.space)
    try:
        params, ignored = state_dict.to_params(state, config.space)
        sizes = state_dict.vocab_sizes(state)
    except state_dict.CheckpointError as e:
        raise type(e)(f"checkpoint {source}: {e}") from None
    scales = scales_of(config.space)
    params = with_scales(params, Scales(1 / scales.ffn, 1 / scales.attention))
    own = target(config, sizes, subnet)
    if subnet is not None:
        params = extract(params, subnet, own.hull)
    # `to_params` has checked the checkpoint's shapes; this checks `to_params`.
    check_shapes(params, abstract_state(own, config.training, config.seed).params)
    return params, sizes, ignored


def _make_tokenizer(run: Run, wanted: TokenizerConfig | None, sizes: tuple[int, int]) -> str:
    """Makes the run's tokenizer, or checks the one that it has; returns its description."""
    folder, data = run.tokenizer, run.config.data
    languages = data.source_lang, data.target_lang
    if wanted is None:
        found = tokenizers.load(folder)
        _check_sizes(found, sizes)
        return _describe(found, languages)
    # In a temporary folder first: nothing is written to the run before all checks have passed.
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "tokenizer"
        if wanted.kind == "ids":
            token_ids.make(sizes, made)
        else:
            make_tokenizer(run, wanted, made, list)
        found = tokenizers.load(made)
        _check_sizes(found, sizes)
        if not folder.is_dir():
            tokenizers.copy(made, folder)
        elif tokenizers.load(folder).content != found.content:
            raise UserError(f"{folder} is another tokenizer; name a new --workdir")
    return _describe(found, languages)


def _describe(tokenizer: Tokenizer, languages: tuple[str, str]) -> str:
    if tokenizer.kind == "ids":
        return "token ids separated by blanks"
    words = f"{tokenizer.kind}, {languages[0]} to {languages[1]}"
    if isinstance(tokenizer, FairseqBpe):
        words += "; Moses " + ("splits" if tokenizer.splits_dashes else "does not split")
        words += " compounds at dashes (as the dictionary says)"
    return words


def _check_sizes(tokenizer: Tokenizer, sizes: tuple[int, int]):
    if tokenizer.vocab_sizes != sizes:
        ours, theirs = (f"{a:,} and {b:,}" for a, b in (tokenizer.vocab_sizes, sizes))
        raise UserError(
            f"the tokenizer has {ours} entries for source and target, the checkpoint's tables "
            f"{theirs}; is it the dictionary that the model was trained with?"
        )


def write_checkpoint(run: Run, path: Path):
    """Writes the run's supernet as a fairseq state dict (.npz, .safetensors)."""
    if not (run.path / workdir.MANIFEST).exists():
        raise UserError(f"--workdir {run.path} is not a run")
    params, _ = supernet_params(run, vocab_sizes(run))
    space = run.config.space
    _check_published(space)
    checkpoint.write(path, state_dict.from_params(with_scales(params, scales_of(space)), space))


def tokenizer_config(
    config: TokenizerConfig,
    kind: str | None,
    dictionaries: tuple[str, ...],
    codes: str | None,
    *,
    lowercase: bool,
) -> TokenizerConfig | None:
    """The tokenizer's settings by the program's options, else by the config.

    None if neither names a tokenizer: the run's own is meant.
    """
    if dictionaries or codes or kind == "bpe":
        if kind == "ids":
            raise UserError("--tokenizer=ids takes no --dict and no --bpe_codes")
        if not dictionaries and not codes and config.kind == "bpe":
            return dataclasses.replace(config, lowercase=lowercase or config.lowercase)
        if not dictionaries or not codes:
            raise UserError("text needs --dict and --bpe_codes together; or use --tokenizer=ids")
        return dataclasses.replace(
            TokenizerConfig(), kind="bpe", dictionaries=dictionaries, bpe_codes=codes,
            lowercase=lowercase,
        )  # fmt: skip
    if lowercase and config.kind != "bpe":
        raise UserError("--lowercase is for --dict and --bpe_codes")
    if kind == "ids":
        return TokenizerConfig(kind="ids")
    if config.kind == "sentencepiece":
        return None
    return dataclasses.replace(config, lowercase=lowercase or config.lowercase)
