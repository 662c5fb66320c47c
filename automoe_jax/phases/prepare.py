"""The first phase: corpus, tokenizer and token ids."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from automoe_jax.data import tokens
from automoe_jax.data.config import DataConfig
from automoe_jax.data.corpus import Split, check_unchanged, open_corpus, taken_out
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers import sentence_piece, token_ids
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.data.tokens import PreparedData, TokenPairs
from automoe_jax.phases.run import Run, after_first, is_converted
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError


def prepare(run: Run, init_from: Path | None = None) -> PreparedData:
    """Makes what is missing of `corpus/`, `tokenizer/` and `tokens/`, and opens it.

    On a pod the first process does it and the others wait; they share the workdir. The tokenizer
    is that of the folder `init_from`, if weights will be inherited or predictions learned from
    there.

    Raises:
      UserError: no corpus, no usable pair, or another tokenizer than that of `init_from`.
    """
    _check_corpus(run.config.data, run.path)
    given = run.config.data.path
    if given and files.expanded(given).absolute() == run.path:
        raise UserError(f"--workdir is the folder of the corpus, {given}; name another one")
    if jax.process_index() == 0:
        _make(run, None if init_from is None else init_from / run.tokenizer.name)
    after_first(run, "prepare")
    train, valid = (tokens.load(run.tokens / name) for name in ("train", "valid"))
    for name, pairs in (("train", train), ("valid", valid)):
        if not len(pairs):
            left_out = ", ".join(f"{n:,} {why}" for why, n in pairs.counts.items() if n)
            raise UserError(f"no pair of {name} can be used ({left_out.replace('_', ' ')})")
    return PreparedData(tokenizers.load(run.tokenizer), train, valid)


def other_text(run: Run, corpus: Path) -> TokenPairs:
    """The training text of a corpus folder, by the run's tokenizer; kept in its `tokens/`.

    `UserError` if nothing of it can be used.
    """
    data = dataclasses.replace(run.config.data, kind="parallel_text", path=str(corpus))

    def split() -> Split:
        return open_corpus(data, corpus / "corpus")["train"]

    return _tokens_of(run, "train", split, corpus / "tokens", str(corpus))


def split_tokens(run: Run, name: str) -> TokenPairs:
    """A split of the run's corpus by its tokenizer, kept in `tokens/`; `UserError` without one."""
    return _tokens_of(run, name, lambda: corpus_split(run, name), run.tokens, name)


def _tokens_of(
    run: Run, name: str, split: Callable[[], Split], folder: Path, what: str
) -> TokenPairs:
    """The pairs in `folder`/`name`, made of `split()` where they are missing.

    `UserError`, which names `what`, if none can be used.
    """
    if jax.process_index() == 0 and not (folder / name).is_dir():
        _tokenize(run, name, split(), folder)
    after_first(run, f"prepare {run.stored(folder / name)}")
    found = tokens.load(folder / name)
    if not len(found):
        raise UserError(f"no pair of {what} can be used")
    return found


def vocab_sizes(run: Run) -> tuple[int, int]:
    """Vocabulary sizes of source and target; `UserError` if the run has no tokenizer yet."""
    return tokenizers.load(run.tokenizer).vocab_sizes


def open_splits(run: Run) -> dict[str, Split]:
    """All splits of the run's corpus, by name."""
    return open_corpus(run.config.data, run.corpus)


def corpus_split(run: Run, name: str) -> Split:
    """One split of the run's corpus; `UserError` if there is none of that name."""
    return _split(open_splits(run), name)


def stored_split(path: Path, name: str) -> Split:
    """One split of a workdir's corpus, by the settings in the workdir's manifest."""
    data = DataConfig(**workdir.settings(path, "run")["data"])
    _check_corpus(data, path)
    return _split(open_corpus(data, path / "corpus"), name)


def _split(splits: dict[str, Split], name: str) -> Split:
    if name not in splits:
        raise UserError(f"the corpus has no split {name!r}; it has {', '.join(sorted(splits))}")
    return splits[name]


def _check_corpus(data: DataConfig, path: Path):
    """Refuses to use built-in phrases, the default corpus, with converted weights."""
    if data.kind == "phrases" and is_converted(path):
        raise UserError(
            f"{path} has converted weights and no corpus; name one, as "
            "--config.data.kind=parallel_text --config.data.path=DIR"
        )


def make_tokenizer(
    run: Run, config: TokenizerConfig, folder: Path, text: Callable[[], Iterable[str]]
):
    """Makes a tokenizer's folder; `text` returns the sentences that SentencePiece is trained on."""
    if config.kind == "sentencepiece":
        run.progress.note(f"training a SentencePiece BPE model of {config.vocab_size:,} pieces")
        sentence_piece.train(text(), folder, config)
    elif config.kind == "bpe":
        # Saves the other kinds 0.3 s of start-up (sacremoses).
        from automoe_jax.data.tokenizers import fairseq_bpe  # noqa: PLC0415

        languages = run.config.data.source_lang, run.config.data.target_lang
        dictionaries = [files.expanded(path) for path in config.dictionaries]
        codes = files.expanded(config.bpe_codes)
        fairseq_bpe.make(dictionaries, codes, languages, folder, lowercase=config.lowercase)
    else:
        token_ids.make(tokenizers.vocab_sizes(config), folder)


def _make(run: Run, tokenizer_from: Path | None):
    data, config, folder = run.config.data, run.config.tokenizer, run.tokenizer
    if folder.is_dir() and tokenizer_from not in (None, folder):
        ours, theirs = (tokenizers.load(x).content for x in (folder, tokenizer_from))
        if ours != theirs:
            raise UserError(
                f"{folder} is not the tokenizer of the model that this one starts or learns from "
                f"({tokenizer_from}); use that run's --workdir, or a new one"
            )
    missing = [n for n in ("train", "valid") if not (run.tokens / n).is_dir()]
    if folder.is_dir() and not missing:
        check_unchanged(data, run.corpus)
        return
    unused = not folder.is_dir() and len(missing) == 2
    corpus = open_corpus(data, run.corpus, unused=unused)
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in corpus.items())
    taken = " and ".join(taken_out(data))
    ending = f" ({taken} taken out of train, as the folder has none)" if taken else ""
    run.progress.note(f"corpus {data.name or data.path or data.kind}: {sizes} pairs{ending}")
    if not folder.is_dir() and tokenizer_from is not None:
        tokenizers.copy(tokenizer_from, folder)
    elif not folder.is_dir():
        train = corpus["train"]
        make_tokenizer(
            run, config, folder, lambda: tokens.sample_sentences(train, config.max_sentences)
        )
    for name in missing:
        _tokenize(run, name, corpus[name], run.tokens)


def _tokenize(run: Run, name: str, split: Split, folder: Path):
    max_length, folder = run.config.data.max_length, folder / name
    task = run.progress.task(f"tokenising {name}", len(split))
    tokens.tokenize(
        split, tokenizers.load(run.tokenizer), max_length, folder, lambda done, _: task.update(done)
    )
    task.close()
    counts = tokens.load(folder).counts
    run.progress.note(
        f"{name}: {counts['kept']:,} pairs kept; left out: {counts['empty']:,} empty, "
        f"{counts['too_long']:,} longer than {max_length} tokens, "
        f"{counts['not_utf8']:,} not UTF-8"
    )
