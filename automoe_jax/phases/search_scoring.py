"""Scores of a search's candidates: on the sample of the validation set, then on the whole."""

import math
from collections.abc import Callable
from typing import Any

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.phases.search_context import SearchContext, describe
from automoe_jax.phases.search_history import ScoreHistory
from automoe_jax.search.candidates import Candidate, Scored, best_first
from automoe_jax.search.limits import Limits


def score(
    search: SearchContext, limits: Limits, candidates: list[Candidate], done: int, task: Any
) -> list[Scored]:
    """Scores candidates, in their order; what the history has is not scored again."""
    history, batch_size = search.history, search.objective.batch_size
    missing = [c for c in candidates if history.loss(c.subnet) is None]
    for candidate in candidates:
        if history.loss(candidate.subnet) is not None:
            # In the order of an unbroken search: each latency that was asked for corrects others.
            search.costs(candidate.subnet)
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        losses = search.objective.sample([c.subnet for c in batch])
        for candidate, loss in zip(batch, losses, strict=True):
            history.append(candidate.subnet, loss, describe(search, limits, candidate))
        task.update(done + start + len(batch), best=_best(history))
    task.update(done + len(candidates), best=_best(history))
    found = [(c, history.loss(c.subnet)) for c in candidates]
    return [Scored(c, loss) for c, loss in found if loss is not None]


def _best(history: ScoreHistory) -> str:
    return f"{min((line['loss'] for line in history.lines), default=math.inf):.4f}"


def rescored(
    search: SearchContext, within: Callable[[Subnet], bool], scored: list[Scored]
) -> list[Scored]:
    """The best candidates within limits, by their score on all validation pairs."""
    count = max(search.config.parents, 2 * search.config.keep)
    best = [s for s in scored if within(s.subnet)][:count]
    search.run.progress.note(f"scoring the last {len(best)} on the whole validation set")
    return best_first([Scored(s.candidate, search.full_score(s.subnet)) for s in best])
