"""What a searched mixture's quality is made of: differences between systems of one study."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy  # loads `scipy.stats` at its first use

from automoe_jax.report.systems import PairedDifference, Row

_Other = Callable[[Row, Sequence[Row]], Row | None]


@dataclasses.dataclass(frozen=True)
class Gain:
    """A comparison of COMPARED at a budget: of each seed one difference of BLEU, fp32."""

    what: str
    against: tuple[str, ...]  # labels, each once
    budget: str
    bleus: tuple[float, ...]  # in the order of the seeds
    latencies: tuple[float, ...]  # shares of the others'; of what was timed
    flops: tuple[float, ...]  # shares of the others'
    as_fast: bool | None  # whether none is surely slower than the other; None where not known
    as_good: bool  # whether none is surely worse
    nats: tuple[float, ...]  # how much lower the validation losses are, where known
    inherited: tuple[float, ...]  # the same with weights of one supernet
    difference: PairedDifference | None  # of one seed, if the two were compared directly

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean, 95 %, seeds as the unit (Student); of one seed over sentences, if known."""
        n = len(self.bleus)
        if n < 2:
            return None if self.difference is None else self.difference.bleu[1:]
        error = float(np.std(self.bleus, ddof=1)) / math.sqrt(n)
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * error
        mean = float(np.mean(self.bleus))
        return mean - half, mean + half


def gains(rows: Sequence[Row]) -> list[Gain]:
    """Each comparison and budget that has both models of a seed, in the order of COMPARED.

    `rows` are those of a result file of benchmarks/paper_tables.py.
    """
    found = []
    rows = [row for row in rows if "fp32" in row.precisions]
    for what, system, other_of in COMPARED:
        own = sorted((row for row in rows if row.system == system), key=lambda row: row.seed)
        for budget in dict.fromkeys(row.budget for row in own):
            pairs = [(row, other_of(row, rows)) for row in own if row.budget == budget]
            known = [(row, other) for row, other in pairs if other is not None]
            if known:
                found.append(_gain(what, budget, known))
    return found


def _gain(what: str, budget: str, pairs: Sequence[tuple[Row, Row]]) -> Gain:
    labels = dict.fromkeys(other.label for _, other in pairs)
    bleus = tuple(
        row.precisions["fp32"].bleu[0] - other.precisions["fp32"].bleu[0] for row, other in pairs
    )
    differences = [row.difference(other) for row, other in pairs]
    known = [x for x in differences if x is not None]
    if len(known) == len(pairs):
        latencies = tuple(x.latency_ratio[0] for x in known)
    else:
        latencies = tuple(_quotients(pairs))
    nats = tuple(
        other.loss - row.loss for row, other in pairs
        if row.loss is not None and other.loss is not None
    )  # fmt: skip
    inherited = tuple(x.inherited for x in known if x.inherited is not None)
    one = differences[0] if len(pairs) == 1 else None
    flops = tuple(row.gflops / other.gflops for row, other in pairs)
    timed = [_as_fast(row, other) for row, other in pairs]
    as_fast = None if None in timed else all(timed)
    as_good = all(_not_worse(row, other) for row, other in pairs)
    speeds = latencies, flops, as_fast, as_good
    return Gain(what, tuple(labels), budget, bleus, *speeds, nats, inherited, one)


def _quotients(pairs: Sequence[tuple[Row, Row]]) -> Iterator[float]:
    """Of two models' shares of the reference's latency, where both were timed."""
    for pair in pairs:
        own, its = (row.precisions["fp32"].share for row in pair)
        if own and its:
            yield own / its


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header, then a row for each of `gains`: means over seeds, the interval, and each seed."""
    found = [[
        "what", "against", "budget", "BLEU", "95 %", "of each seed", "nats", "inherited", "latency",
        "FLOPs",
    ]]  # fmt: skip
    for gain in gains(rows):
        interval, several = gain.interval, len(gain.bleus) > 1
        found.append([
            gain.what, ", ".join(gain.against), gain.budget, f"{np.mean(gain.bleus):+.1f}",
            "" if interval is None else "{:+.1f}, {:+.1f}".format(*interval),
            ", ".join(f"{x:+.1f}" for x in gain.bleus) if several else "one seed",
            *(f"{np.mean(x):+.3f}" if x else "" for x in (gain.nats, gain.inherited)),
            _latency(gain), f"{np.mean(gain.flops):.2f}",
        ])  # fmt: skip
    return found


def _latency(gain: Gain) -> str:
    if not gain.latencies:
        return ""
    mean = f"{np.mean(gain.latencies):.2f}"
    if gain.difference is None:
        return mean
    return mean + " [{:.2f}, {:.2f}]".format(*gain.difference.latency_ratio[1:])


def _same(system: str) -> _Other:
    """A system at the same budget with the same seed."""

    def of(row: Row, rows: Sequence[Row]) -> Row | None:
        wanted = system, row.budget, row.seed
        return next((x for x in rows if (x.system, x.budget, x.seed) == wanted), None)

    return of


def _by_hand(family: str) -> _Other:
    """The best model of a family made by hand that is not surely slower.

    Of each system that of the same seed, or where it has none its first.
    """

    def of(row: Row, rows: Sequence[Row]) -> Row | None:
        systems: dict[str, Row] = {}
        for x in (x for x in rows if x.system.startswith(family)):
            if x.system not in systems or x.seed == row.seed:
                systems[x.system] = x
        fitting = [x for x in systems.values() if _as_fast(x, row)]
        return max(fitting, key=lambda x: x.precisions["fp32"].bleu[0], default=None)

    return of


def _as_good(system: str) -> _Other:
    """The fastest model of a system with the same seed that is not surely worse, at any budget."""

    def of(row: Row, rows: Sequence[Row]) -> Row | None:
        own = [x for x in rows if (x.system, x.seed) == (system, row.seed)]
        shares = [(x.precisions["fp32"].share, x) for x in own if _not_worse(x, row)]
        timed = [(share, x) for share, x in shares if share is not None]
        return min(timed, key=lambda found: found[0])[1] if timed else None

    return of


def _not_worse(row: Row, other: Row) -> bool:
    """Whether a model's BLEU is not surely lower than another one's."""
    if found := row.difference(other):
        return found.bleu[2] >= 0
    (bleu, _, high), (its, low, _) = (x.precisions["fp32"].bleu for x in (row, other))
    return (bleu if high is None else high) >= (its if low is None else low)


def _as_fast(row: Row, other: Row) -> bool | None:
    """Whether a model is not surely slower than another one; None if one was not timed."""
    if found := row.difference(other):
        return found.latency_ratio[1] <= 1
    own, its = (x.precisions["fp32"].of_reference for x in (row, other))
    return None if own is None or its is None else own[1] <= its[2]


ARCHITECTURE = "architecture: searched, not random"
AS_GOOD = "HAT's fastest that is not surely worse"
DENSE_BY_HAND = "the best dense model made by hand that is as fast"
MIXTURE_BY_HAND = "the best mixture made by hand that is as fast"
# In words; the system that should be better; the model that a row of it is compared with.
COMPARED: tuple[tuple[str, str, _Other], ...] = (
    (ARCHITECTURE, "automoe", _same("random")),
    ("experts: searched alike without them", "automoe", _same("hat")),
    (AS_GOOD, "automoe", _as_good("hat")),
    (DENSE_BY_HAND, "automoe", _by_hand("mini_transformer")),
    (MIXTURE_BY_HAND, "automoe", _by_hand("mini_switch")),
    ("heterogeneity: sizes of experts", "automoe", _same("automoe_standard")),
    ("limit: latency, not FLOPs", "automoe", _same("automoe_flops")),
    ("depth of the encoder: searched", "automoe", _same("fixed_encoder")),
    *(
        (
            f"numbers of experts: searched, not {'-'.join(numbers)}",
            "automoe",
            _same(f"placement_{numbers}"),
        )
        for numbers in ("121212", "111222", "222111")
    ),
    *((f"at most {n} experts a layer", "automoe", _same(f"experts_{n}")) for n in (2, 4, 6, 16)),
    ("experts of several sizes, not identities", "automoe", _same("identity")),
    ("training: the teacher's translations", "automoe", _same("automoe_undistilled")),
    ("training: inherited weights", "automoe_inherited", _same("automoe")),
)
