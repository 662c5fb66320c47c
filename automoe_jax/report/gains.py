"""What a searched mixture's quality is made of: differences between systems of one study."""

from collections.abc import Callable, Sequence

from automoe_jax.report.systems import Row

_Other = Callable[[Row, Sequence[Row]], Row | None]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header, then a row for each comparison of COMPARED, budget and seed that has both models.

    BLEU and latency are of fp32; the latter a quotient of shares of the reference's latency, empty
    where one of the two was not timed. `rows` are those of a result file of
    benchmarks/paper_tables.py.
    """
    found = [["what", "against", "budget", "seed", "BLEU", "latency"]]
    rows = [row for row in rows if "fp32" in row.precisions]
    for what, system, other_of in COMPARED:
        for row in (row for row in rows if row.system == system):
            other = other_of(row, rows)
            if other is None:
                continue
            own, its = row.precisions["fp32"], other.precisions["fp32"]
            quotient = ""
            if own.of_reference and its.of_reference:
                quotient = f"{own.of_reference[0] / its.of_reference[0]:.2f}"
            gain = f"{own.bleu[0] - its.bleu[0]:+.1f}"
            found.append([what, other.label, row.budget, str(row.seed), gain, quotient])
    return found


def _same(system: str) -> _Other:
    """A system at the same budget with the same seed."""

    def of(row: Row, rows: Sequence[Row]) -> Row | None:
        wanted = system, row.budget, row.seed
        return next((x for x in rows if (x.system, x.budget, x.seed) == wanted), None)

    return of


def _by_hand(family: str) -> _Other:
    """The best model of a family made by hand that is not surely slower.

    Of the same seed where there is one.
    """

    def of(row: Row, rows: Sequence[Row]) -> Row | None:
        most = row.precisions["fp32"].of_reference
        known = [(x, x.precisions["fp32"].of_reference) for x in rows]
        fitting = [
            x
            for x, share in known
            if x.system.startswith(family) and most and share and share[1] <= most[2]
        ]
        fitting = [x for x in fitting if x.seed == row.seed] or fitting
        return max(fitting, key=lambda x: x.precisions["fp32"].bleu[0], default=None)

    return of


# In words; the system that should be better; the model that a row of it is compared with.
COMPARED: tuple[tuple[str, str, _Other], ...] = (
    ("architecture: searched, not random", "automoe", _same("random")),
    ("experts: searched alike without them", "automoe", _same("hat")),
    ("the best dense model made by hand that is as fast", "automoe", _by_hand("mini_transformer")),
    ("the best mixture made by hand that is as fast", "automoe", _by_hand("mini_switch")),
    ("heterogeneity: sizes of experts", "automoe", _same("automoe_standard")),
    ("training: the teacher's translations", "automoe", _same("automoe_undistilled")),
    ("training: inherited weights", "automoe_inherited", _same("automoe")),
)
