"""Makes a run of a fairseq checkpoint: its weights in `supernet/` or `subnet/`, its tokenizer."""

import dataclasses
import tempfile
from pathlib import Path

from automoe_jax.architecture.subnet import Subnet, to_json
from automoe_jax.config import RunConfig
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers import token_ids
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.model.extract import extract
from automoe_jax.phases import prepare
from automoe_jax.phases import run as phases
from automoe_jax.published import checkpoint, state_dict
from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress
from automoe_jax.training import loop
from automoe_jax.training.checkpoints import Checkpoints


def convert(
    config: RunConfig,
    source: Path,
    run: Path,
    tokenizer: TokenizerConfig | None,
    progress: Progress,
    subnet: Subnet | None = None,
) -> Path:
    """Reads a checkpoint and writes it as a run that the other phases go on from.

    Nothing is written where anything is wrong with the checkpoint or the tokenizer.

    Args:
      config: of the run; the checkpoint must be the supernet of its space.
      source: the checkpoint.
      run: workdir.
      tokenizer: how text becomes ids; None for the tokenizer that the run has. Kind "ids" has as
        many as the checkpoint.
      progress: told what was read.
      subnet: the architecture that was trained inside the supernet, which alone is kept; None for
        a supernet.

    Returns:
      The folder that holds the weights.

    Raises:
      UserError: the checkpoint cannot be read, is of another space or vocabulary, or the folder
        has weights already.
    """
    if subnet is not None:
        config.space.validate(subnet)
    kind = phases.SUPERNET if subnet is None else phases.SUBNET
    folder = run / kind
    if (run / workdir.MANIFEST).exists():
        phases.open_run(config, run)
    others = {x.name for x in folder.iterdir()} if folder.is_dir() else set()
    others -= {workdir.MANIFEST, loop.CHECKPOINTS}  # what a killed conversion leaves
    if loop.latest_step(folder) is not None or others:
        raise UserError(f"{folder} has weights already; name a new --workdir")
    state = checkpoint.read(source)
    try:
        params, ignored = state_dict.to_params(state, config.space)
        sizes = state_dict.vocab_sizes(state)
    except state_dict.CheckpointError as e:
        raise type(e)(f"checkpoint {source}: {e}") from None
    what = phases.trained(config, sizes, subnet)
    if subnet is not None:
        params = extract(params, subnet, what.hull)
    # The checkpoint's shapes are right; that ours are is checked all the same.
    abstract = loop.abstract_state(what, config.training, config.seed).params
    loop.check_shapes(params, abstract)

    made = _make_tokenizer(config, run, tokenizer, sizes, progress)
    progress.note(
        f"{source}: {len(state) - len(ignored)} arrays used; ignored: "
        f"{', '.join(ignored) or 'none'}"
    )
    progress.note(f"text: {made}")
    origin = {workdir.CONVERTED: {"checkpoint": source.name, "text": made}}
    if not (run / workdir.MANIFEST).exists():
        common = config.groups("seed", "data", "tokenizer")
        workdir.write(run, "run", {"config": common, **origin})
    groups = ("seed", "data", "tokenizer", "space", "model")
    if subnet is None:
        about = config.groups(*groups, "training", "sampling")
    else:
        about = config.groups(*groups, "subnet_training")
        about |= {"subnet": to_json(subnet), "init_from": None}
    workdir.write(folder, kind, {"config": about, **origin})
    checkpoints = Checkpoints(folder / loop.CHECKPOINTS)
    checkpoints.save_params(params, 0)
    checkpoints.close()
    return folder


def _make_tokenizer(
    config: RunConfig,
    run: Path,
    wanted: TokenizerConfig | None,
    sizes: tuple[int, int],
    progress: Progress,
) -> str:
    """The run's tokenizer: made as wanted, or the one that is there; it must fit the tables.

    Returns:
      What it is, in words.
    """
    folder = run / "tokenizer"
    languages = config.data.source_lang, config.data.target_lang
    if wanted is None:
        found = tokenizers.load(folder)
        _check_sizes(found, sizes)
        return _in_words(found, languages)
    # Elsewhere first: a run is begun when everything is known to be right.
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "tokenizer"
        if wanted.kind == "ids":
            token_ids.make(sizes, made)
        else:
            prepare.make_tokenizer(wanted, languages, made, progress, list)
        found = tokenizers.load(made)
        _check_sizes(found, sizes)
        if not folder.is_dir():
            tokenizers.copy(made, folder)
        elif tokenizers.load(folder).content != found.content:
            raise UserError(f"{folder} is another tokenizer; name a new --workdir")
    return _in_words(found, languages)


def _in_words(tokenizer: Tokenizer, languages: tuple[str, str]) -> str:
    if tokenizer.kind == "ids":
        return "token ids separated by blanks"
    words = f"{tokenizer.kind}, {languages[0]} to {languages[1]}"
    if tokenizer.kind == "bpe":
        from automoe_jax.data.tokenizers.fairseq_bpe import FairseqBpe  # noqa: PLC0415

        assert isinstance(tokenizer, FairseqBpe)
        words += "; Moses " + ("splits" if tokenizer.splits_dashes else "does not split")
        words += " compounds at dashes (as the dictionary says)"
    return words


def _check_sizes(tokenizer: Tokenizer, sizes: tuple[int, int]):
    if tokenizer.vocab_sizes != sizes:
        ours, theirs = (
            " and ".join(f"{n:,}" for n in pair) for pair in (tokenizer.vocab_sizes, sizes)
        )
        raise UserError(
            f"the tokenizer has {ours} entries for source and target, the checkpoint's tables "
            f"{theirs}; is it the dictionary that the model was trained with?"
        )


def write_checkpoint(config: RunConfig, run: Path, target: Path):
    """Writes the supernet of a run as the fairseq state dict that `convert` reads.

    Args:
      config: of the run.
      run: workdir.
      target: .npz or .safetensors.
    """
    if not (run / workdir.MANIFEST).exists():
        raise UserError(f"--workdir {run} is not a run")
    sizes = tokenizers.load(run / "tokenizer").vocab_sizes
    params, _ = phases.supernet_params(config, run, sizes)
    checkpoint.write(target, state_dict.from_params(params, config.space))


def tokenizer_config(
    config: TokenizerConfig,
    kind: str | None,
    dictionaries: tuple[str, ...],
    codes: str | None,
    lowercase: bool,
) -> TokenizerConfig | None:
    """The tokenizer that the options of the program name; the config's where they are silent.

    Args:
      config: of the run.
      kind: "bpe", "ids" or None.
      dictionaries: none, one or two files.
      codes: file of merges, or None.
      lowercase: whether text is made lower case.

    Returns:
      None where neither says: the run's own tokenizer is meant.
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
