"""The systems of paper_tables.py, the corpora, and the parts that their comparison is made of."""

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from automoe_jax.report import gains

REFERENCE = "mini_transformer_big"  # latencies are shares of this one's
ARCHITECTURES = Path(__file__).resolve().parent.parent / "configs" / "systems"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus and how its systems are trained.

    Attributes:
      config: of configs/, for text, sizes and recipe.
      updates: of a supernet; of each model; of the teacher, 0 for none.
      budgets: latencies, as shares of the reference's.
      settings: for all trainings of this corpus, beside those of the config.
      search: for all searches.
      tests: file names of further test sets, beside the test split.
      ranked: subnets that a ranking trains.
      same: systems that are another one here, and so left out.
      goals: BLEU by which what search finds is to be better, by names of `report.gains`.
      best: the BLEU that one model is to have, and within how many milliseconds a sentence.
    """

    config: str
    updates: tuple[int, int, int]
    budgets: tuple[float, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    tests: tuple[str, ...] = ()
    ranked: int = 16
    same: tuple[str, ...] = ()
    goals: dict[str, float] = dataclasses.field(default_factory=dict)
    best: tuple[float, float] | None = None

    @property
    def distils(self) -> bool:
        """Whether models have a teacher's translations beside the text; else the text alone."""
        return self.updates[2] > 0

    @property
    def middle(self) -> float:
        """The budget at which everything is compared."""
        return self.budgets[len(self.budgets) // 2]


_GOALS = {gains.ARCHITECTURE: 1.0, gains.DENSE_BY_HAND: 2.0, gains.MIXTURE_BY_HAND: 0.5}
CORPORA = {
    # No teacher: translating its 174,000 pairs would take longer than several of the models.
    # Supernets draw all depths alike, whatever the config says.
    "msdocs": Corpus(
        "msdocs", (2400, 2400, 0), (0.35, 0.5, 0.7), {"sampling.depth_bias": 0.0},
        same=("experts_4",), goals=_GOALS, best=(32.0, 6.0),
    ),
    # And deep stacks more often: at the budget that leaves room for them.
    "msdocs_deep": Corpus(
        "msdocs", (2400, 2400, 0), (0.7,), {"sampling.depth_bias": 2.0}, same=("experts_4",),
        goals=_GOALS, best=(32.0, 6.0),
    ),
    "multi30k": Corpus(
        "multi30k", (2500, 1500, 2500), (0.5,), tests=("test2017_flickr",),
        goals={**_GOALS, gains.DENSE_BY_HAND: 0.5}, best=(36.0, 5.0),
    ),
    # To try this program out, within minutes: results mean nothing.
    "quickstart": Corpus(
        "quickstart",
        (30, 20, 30),
        (0.6,),
        {"data.train_pairs": 500, "data.valid_pairs": 50, "data.test_pairs": 50,
         "training.warmup_steps": 10},
        {"predictor.subnets": 8, "predictor.held_out": 3, "search.population": 6,
         "search.iterations": 1, "search.mutations": 2, "search.crossovers": 2,
         "search.parents": 2, "search.latency_runs": 10},
        ranked=9,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
      space: of configs/systems.py, whose supernet it searches; empty for an architecture by hand.
      holder: of configs/systems.py, the space that holds an architecture by hand.
      claim: a claim rests on it: several seeds, all budgets. Else one seed, the middle budget.
      inherit: whether its subnet starts from the supernet's weights.
      distilled: whether the teacher's translations stand beside the text, if there is a teacher.
      of: the system whose found subnets it trains, in place of searching itself.
      calibrated: whether trained subnets correct the losses of its search; the same for all seeds.
    """

    name: str
    space: str = ""
    claim: bool = False
    inherit: bool = False
    distilled: bool = True
    of: str = ""
    holder: str = "by_hand"
    calibrated: bool = False


_CLAIMS = (
    "mini_transformer_base",
    "mini_transformer_4_1",
    "mini_transformer_deep_1",
    "mini_transformer_deep_2",
    "mini_switch_4_1",
    "mini_switch_deep_2",
)
SYSTEMS = {
    system.name: system
    for system in (
        System("automoe", "automoe", claim=True),
        System("hat", "hat", claim=True),
        System("random", "random", claim=True),
        System("automoe_calibrated", "automoe", claim=True, calibrated=True),
        System("automoe_standard", "automoe_standard"),
        System("automoe_flops", "automoe"),  # Table 6: limited by FLOPs instead of latency
        *(System(name, name) for name in (
            "experts_2", "experts_4", "experts_6", "experts_16", "elastic_encoder", "fixed_encoder",
            "placement_121212", "placement_111222", "placement_222111", "identity")),
        System("automoe_inherited", "automoe", inherit=True, of="automoe"),
        System("automoe_undistilled", "automoe", distilled=False, of="automoe"),
        *(System(path.stem, claim=path.stem in _CLAIMS,
                 holder="evolved" if "evolved" in path.stem else "by_hand")
          for path in sorted(ARCHITECTURES.glob("*.json"))),
    )
}  # fmt: skip
# Spaces that share a supernet.
SAME_SPACE = {"random": "automoe"}
# Parts that run one on each core, those of a group together; others run alone, on all.
TOGETHER = (("supernet", "teacher"), ("ranking",), ("model",))
KINDS = ("largest", "supernet", "teacher", "ranking", "search", "model", "latency", "difference")
OURS = "automoe"  # the system that each other one is compared with directly


class Part(NamedTuple):
    """What is done once, and is one line of the results.

    "largest" times the largest subnet of a space beside the reference, "supernet" trains the
    supernet of a space, "ranking" trains some of its subnets a little, "search" finds a system's
    subnet, "model" trains and scores it, "latency" times it, "difference" compares it directly with
    that of OURS at a budget. Teacher, largest subnets and rankings have no seed but 0.
    """

    kind: str
    name: str  # of a system or a space
    budget: float = 0.0  # 0: none
    seed: int = 0

    @property
    def folder(self) -> str:
        """The name of the folder of its files."""
        return "-".join([self.name, *[f"{self.budget:g}"] * bool(self.budget), str(self.seed)])

    @property
    def title(self) -> str:
        """For people."""
        budget = f" at {self.budget:g}" if self.budget else ""
        return f"{self.kind} {self.name}{budget}, seed {self.seed}"


TEACHER = Part("teacher", "teacher")


def supernet_of(system: System, seed: int) -> Part:
    """The supernet that a system searches."""
    return Part("supernet", SAME_SPACE.get(system.space, system.space), seed=seed)


def search_of(model: Part) -> Part:
    """The search that found a model's subnet."""
    return model._replace(kind="search", name=SYSTEMS[model.name].of or model.name)


def compared(difference: Part) -> tuple[Part, Part]:
    """The models of a difference: that of OURS, and the other system's."""
    ours = difference._replace(kind="model", name=OURS)
    budget = difference.budget if SYSTEMS[difference.name].space else 0.0
    return ours, difference._replace(kind="model", budget=budget)


def taught(corpus: Corpus, system: System) -> bool:
    """Whether the models of a system have the teacher's translations beside the text."""
    return corpus.distils and system.distilled


def needs(corpus: Corpus, part: Part) -> list[Part]:
    """The parts whose lines or files a part takes."""
    if part.kind == "latency":
        return [part._replace(kind="model")]
    if part.kind == "difference":
        return list(compared(part))
    if part.kind == "ranking":
        return [part._replace(kind="supernet")]
    if part.kind not in ("model", "search"):
        return []
    system = SYSTEMS[part.name]
    if part.kind == "model":
        return [search_of(part)] * bool(system.space) + [TEACHER] * taught(corpus, system)
    supernet = supernet_of(system, part.seed)
    found = [Part("largest", supernet.name), supernet]
    if system.calibrated:
        found.append(Part("ranking", supernet.name))
    # What a limit of FLOPs is comes from a search under one of latency.
    return [*found, *[part._replace(name="automoe")] * (part.name == "automoe_flops")]


def systems(corpus: Corpus) -> list[str]:
    """The systems that are compared on a corpus.

    Without a teacher, what differs from another one in having none is left out.
    """
    return [
        name
        for name, system in SYSTEMS.items()
        if name not in corpus.same and (corpus.distils or system.distilled)
    ]


def parts(
    corpus: Corpus, names: list[str], seeds: int, budgets: Collection[float] | None = None
) -> Iterator[Part]:
    """All parts of the comparison of some systems, in an order in which they can be done.

    Seed by seed, so that each seed's comparison is complete before the next; kind by kind. Of
    systems that are searched, those at `budgets`, of the corpus's; None for all. Differences
    only if OURS is among `names`.
    """
    done = set[Part]()
    for seed in range(seeds):
        found: dict[Part, None] = {}
        for system in (SYSTEMS[name] for name in names):
            for part in _final(corpus, system, seed):
                wanted = not part.budget or budgets is None or part.budget in budgets
                if wanted and (part.kind != "difference" or OURS in names):
                    _add(corpus, part, found)
        new = [part for part in found if part not in done]
        yield from sorted(new, key=lambda part: KINDS.index(part.kind))
        done |= set(found)


def _add(corpus: Corpus, part: Part, found: dict[Part, None]):
    """Adds a part behind all that it needs."""
    for needed in needs(corpus, part):
        _add(corpus, needed, found)
    found.setdefault(part)


def _final(corpus: Corpus, system: System, seed: int) -> Iterator[Part]:
    """The parts of a system with a seed that no other part needs; none of a seed that it lacks."""
    if seed and not system.claim:
        return
    by_hand = not system.space
    budgets = corpus.budgets if system.claim or by_hand else (corpus.middle,)
    for budget in (0.0,) if by_hand else budgets:
        yield Part("latency", system.name, budget, seed)
    if system.name != OURS:
        for budget in budgets:
            yield Part("difference", system.name, budget, seed)


def batches(parts: list[Part]) -> Iterator[list[Part]]:
    """The parts in their order, together as long as none needs another of its batch."""
    left = list(parts)
    while left:
        kind = left[0].kind
        together = next((kinds for kinds in TOGETHER if kind in kinds), (kind,))
        n = next((i for i, part in enumerate(left) if part.kind not in together), len(left))
        yield left[:n]
        left = left[n:]
