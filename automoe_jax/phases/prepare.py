"""The first phase: corpus, tokenizer and token ids in a workdir."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from automoe_jax.data import tokens
from automoe_jax.data.config import DataConfig
from automoe_jax.data.corpus import Split, open_corpus
from automoe_jax.data.prepared import PreparedData
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers import sentence_piece, token_ids
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    workdir: Path,
    progress: Progress,
    tokenizer_from: Path | None = None,
) -> PreparedData:
    """Makes what is missing of `corpus/`, `tokenizer/` and `tokens/`, and opens it.

    On a pod the first process makes it and the others wait; they share the workdir.

    Args:
      data, tokenizer: groups of the config.
      workdir: the run.
      progress: told of every step and of pairs left out.
      tokenizer_from: a tokenizer folder to copy instead of training one.
    """
    if jax.process_index() == 0:
        _make(data, tokenizer, workdir, progress, tokenizer_from)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("prepare")
    prepared = PreparedData(
        tokenizers.load(workdir / "tokenizer"),
        *(tokens.load(workdir / "tokens" / name) for name in ("train", "valid")),
    )
    for name, pairs in (("train", prepared.train), ("valid", prepared.valid)):
        if not len(pairs):
            left_out = ", ".join(f"{n:,} {why}" for why, n in pairs.counts.items() if n)
            raise UserError(f"no pair of {name} can be used ({left_out.replace('_', ' ')})")
    return prepared


def open_splits(data: DataConfig, workdir: Path) -> dict[str, Split]:
    """All splits of the workdir's corpus, by name."""
    return open_corpus(data, workdir / "corpus")


def corpus_split(data: DataConfig, workdir: Path, name: str) -> Split:
    """A split of the workdir's corpus; `UserError` naming those there are."""
    splits = open_splits(data, workdir)
    if name not in splits:
        raise UserError(f"the corpus has no split {name!r}; it has {', '.join(sorted(splits))}")
    return splits[name]


def make_tokenizer(
    config: TokenizerConfig,
    languages: tuple[str, str],
    folder: Path,
    progress: Progress,
    text: Callable[[], Iterable[str]],
):
    """Makes a tokenizer's folder.

    Args:
      config: what kind, and of what.
      languages: of source and target.
      folder: where.
      progress: told of it.
      text: gives the sentences that a tokenizer of kind sentencepiece is trained on.
    """
    if config.kind == "sentencepiece":
        progress.note(f"training a SentencePiece BPE model of {config.vocab_size:,} pieces")
        sentence_piece.train(text(), folder, config)
    elif config.kind == "bpe":
        # Imported here: training on SentencePiece needs none of its libraries.
        from automoe_jax.data.tokenizers import fairseq_bpe  # noqa: PLC0415

        dictionaries = [files.expanded(path) for path in config.dictionaries]
        codes = files.expanded(config.bpe_codes)
        fairseq_bpe.make(dictionaries, codes, languages, config.lowercase, folder)
    else:
        token_ids.make(tokenizers.vocab_sizes(config), folder)


def _make(
    data: DataConfig,
    config: TokenizerConfig,
    workdir: Path,
    progress: Progress,
    tokenizer_from: Path | None,
):
    folder = workdir / "tokenizer"
    if folder.is_dir() and tokenizer_from is not None and tokenizer_from != folder:
        ours, theirs = (tokenizers.load(x).content for x in (folder, tokenizer_from))
        if ours != theirs:
            raise UserError(
                f"{folder} is not the tokenizer of the run that weights are taken from "
                f"({tokenizer_from}); use that run's --workdir, or a new one"
            )
    missing = [n for n in ("train", "valid") if not (workdir / "tokens" / n).is_dir()]
    if folder.is_dir() and not missing:
        return
    corpus = open_corpus(data, workdir / "corpus")
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in corpus.items())
    progress.note(f"corpus {data.name or data.path or data.kind}: {sizes} pairs")
    if not folder.is_dir():
        if tokenizer_from is not None:
            tokenizers.copy(tokenizer_from, folder)
        else:
            make_tokenizer(
                config,
                (data.source_lang, data.target_lang),
                folder,
                progress,
                lambda: tokens.sample_sentences(corpus["train"], config.max_sentences),
            )
    tokenizer = tokenizers.load(folder)
    for name in missing:
        task = progress.task(f"tokenising {name}", len(corpus[name]))
        tokens.tokenize(
            corpus[name],
            tokenizer,
            data.max_length,
            workdir / "tokens" / name,
            lambda done, total, task=task: task.update(done),
        )
        task.close()
        counts = tokens.load(workdir / "tokens" / name).counts
        progress.note(
            f"{name}: {counts['kept']:,} pairs kept; left out: {counts['empty']:,} empty, "
            f"{counts['too_long']:,} longer than {data.max_length} tokens, "
            f"{counts['not_utf8']:,} not UTF-8"
        )
