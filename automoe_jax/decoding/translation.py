"""Translates token ids: batches sentences, runs several batches at a time, collects hypotheses."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from automoe_jax.architecture.ids import EOS_ID
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.decoding import native
from automoe_jax.decoding.batching import MAX_SOURCE, Batch, batches, stragglers
from automoe_jax.decoding.programs import Programs
from automoe_jax.decoding.xla_engine import NEVER
from automoe_jax.system.errors import UserError

Output = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One translation of a sentence. `score`: sum of log probabilities over a power of length."""

    text: str
    score: float
    ids: tuple[int, ...]  # without eos


@dataclasses.dataclass(frozen=True)
class Translation:
    """Hypotheses of a sentence, best first; `cut` where the sentence was too long."""

    hypotheses: tuple[Hypothesis, ...]
    cut: bool = False

    @property
    def text(self) -> str:
        return self.hypotheses[0].text

    @property
    def score(self) -> float:
        return self.hypotheses[0].score


# Limits of settings: larger values would be mistakes.
MAX_LENGTH, MAX_PENALTY = 4096, 10.0
EMPTY = Translation((Hypothesis("", 0.0, ()),))


class Settings(NamedTuple):
    """Settings of a beam search; see `Translator.translate`."""

    beam_size: int
    length_penalty: float
    num_hypotheses: int
    max_length: int


def checked(settings: Settings) -> Settings:
    """The same settings; `UserError` where one is not allowed."""
    beam_size, penalty, n, max_length = settings
    if not 1 <= n <= beam_size:
        raise UserError(f"num_hypotheses is {n}; allowed: 1 to the beam size {beam_size}")
    if not 1 <= max_length <= MAX_LENGTH:
        raise UserError(f"max_length is {max_length}; allowed: 1 to {MAX_LENGTH}")
    if not abs(penalty) <= MAX_PENALTY:
        raise UserError(f"length_penalty is {penalty}; allowed: -{MAX_PENALTY} to {MAX_PENALTY}")
    return settings


def translate_ids(
    programs: Programs,
    subnet: Subnet,
    sources: Sequence[Sequence[int]],
    settings: Settings,
    batch_tokens: int,
    progress: Callable[[int, int], None],
) -> list[Translation]:
    """Translates token ids; see `Translator.translate_ids`."""
    if batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}; at least 1 is needed")
    # Keys and values of self-attention, for each sentence and step.
    step_bytes = 8 * settings.beam_size * subnet.qkv_dim * len(subnet.decoder.layers)
    if subnet.cell == "evolved":  # of two, and what convolutions saw
        width = 12 * subnet.decoder.embed_dim * len(subnet.decoder.layers)
        step_bytes = 2 * step_bytes + settings.beam_size * width
    cut = [len(s) > MAX_SOURCE for s in sources]
    sources = [s if len(s) <= MAX_SOURCE else [*s[: MAX_SOURCE - 1], EOS_ID] for s in sources]
    results: list[Translation] = [EMPTY] * len(sources)
    # The first round has caches for usual lengths; sentences that do not end in them are run again
    # with full caches. A sentence's result does not depend on it.
    full = settings.max_length + 1
    left = [i for i, source in enumerate(sources) if source]
    done = len(sources) - len(left)
    for last in (False, True):
        unfinished = [] if last else stragglers(sources)
        left = sorted(set(left) - set(unfinished))
        work = list(batches(sources, left, full, step_bytes, batch_tokens, last=last))
        for batch, out in _run(programs, work, settings):
            for row, i in enumerate(batch.rows):
                if out["complete_B"][row] or batch.time == full:
                    hypotheses = _hypotheses(out, row)[: settings.num_hypotheses]
                    results[i] = Translation(tuple(hypotheses), cut[i])
                    done += 1
                else:
                    unfinished.append(i)
            progress(done, len(sources))
        left = unfinished
    return results


def _run(
    programs: Programs, work: Sequence[Batch], settings: Settings
) -> Iterator[tuple[Batch, Output]]:
    """Yields (batch, output) as batches end.

    Batches run in parallel, each on one core, which is faster than all cores on one batch. New
    shapes go first, one by one: a batch beside a compilation would raise the peak of memory.
    """

    def run(batch: Batch) -> Output:
        numbers = (batch.time, 1, settings.max_length, settings.length_penalty)
        out = programs.run(batch.source_BS, settings.beam_size, *numbers)
        return {name: np.asarray(value) for name, value in out.items()}

    cpus = native.n_threads() if programs.kernels == "native" else 1
    threads = min(cpus, len(work) // 2)
    first, rest = work, []
    if threads > 1:
        shapes = {(*batch.source_BS.shape, batch.time): batch for batch in work}
        first = [b for b in shapes.values() if not programs.is_compiled(b, settings.beam_size)]
        rest = [batch for batch in work if not any(batch is other for other in first)]
    for batch in first:
        yield batch, run(batch)
    if not rest:
        return
    with native.one_thread_a_call(), futures.ThreadPoolExecutor(threads) as pool:
        # Longest first, so that all cores end at about the same time.
        order = sorted(rest, key=lambda batch: -batch.source_BS.size)
        running = {pool.submit(run, batch): batch for batch in order}
        try:
            for future in futures.as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _hypotheses(out: Output, row: int) -> list[Hypothesis]:
    found = zip(out["tokens_BJT"][row], out["score_BJ"][row], out["length_BJ"][row], strict=True)
    return [
        Hypothesis("", float(score), tuple(int(x) for x in tokens[: length - 1]))
        for tokens, score, length in found
        if score > NEVER / 2
    ]
