"""A corpus of a teacher's translations, with a teacher that writes what it is told."""

import dataclasses
from typing import Any

import pytest

from automoe_jax.data.corpus import open_corpus
from automoe_jax.decoding.translation import Hypothesis, Translation
from automoe_jax.phases import distill
from automoe_jax.phases.distill import Distillation
from automoe_jax.system.errors import UserError


class Teacher:
    """Translates by a table: a sentence's hypotheses; by default its capitals. Can be killed."""

    def __init__(self, table=None, kill_at=None):
        self.tokenizer = None
        self.seen, self._table, self._kill_at = [], table or {}, kill_at

    def translate(self, sentences, beam_size, length_penalty, num_hypotheses, progress):
        if self._kill_at is not None and len(self.seen) >= self._kill_at:
            raise KeyboardInterrupt
        self.seen += sentences
        progress(len(sentences), len(sentences))
        return [
            Translation(tuple(
                Hypothesis(text, -n, ())
                for n, text in enumerate(self._table.get(s, [s.upper()])[:num_hypotheses])
            ))
            for s in sentences
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Export(distill.Teacher):
    """The export of a `Teacher`."""

    loaded: Any = None

    def load(self):
        return self.loaded


class Lines:
    """A split of these pairs."""

    def __init__(self, pairs):
        self._pairs = pairs

    def __len__(self):
        return len(self._pairs)

    def read(self, indices):
        return [self._pairs[i] for i in indices]


PAIRS = [(f"source {i}".encode(), f"target {i}".encode()) for i in range(7)]
SPLITS = {"train": Lines(PAIRS), "valid": Lines(PAIRS[:2]), "test": Lines(PAIRS[2:3])}


@pytest.fixture
def distilled(prepared, tmp_path, monkeypatch):
    """Distils `SPLITS`, three pairs at a time; gives the counts and the corpus as it is read."""
    monkeypatch.setattr(distill, "CHUNK", 3)
    monkeypatch.setattr(distill, "read_manifest", lambda path: {"weights_from": "a table"})
    run = prepared[0]

    def make(teacher, splits=None, folder=tmp_path / "out", **how):
        counts = distill.distill(
            run,
            splits or SPLITS,
            Export(tmp_path / "teacher", loaded=teacher),
            Distillation(**how),
            folder,
        )
        data = dataclasses.replace(run.config.data, kind="parallel_text", path=str(folder))
        corpus = open_corpus(data, tmp_path / f"corpus_{folder.name}")
        return counts, {name: split.read(range(len(split))) for name, split in corpus.items()}

    return make


CAPITALS = [(source, source.upper()) for source, _ in PAIRS]


def test_translations_stand_beside_the_text(distilled):
    counts, corpus = distilled(Teacher())
    assert counts == (14, 7)
    assert corpus["train"] == PAIRS + CAPITALS
    assert corpus["valid"] == PAIRS[:2]
    assert corpus["test"] == PAIRS[2:3]


def test_translations_alone(distilled):
    counts, corpus = distilled(Teacher(), original=False)
    assert counts == (7, 7)
    assert corpus["train"] == CAPITALS


def test_a_killed_run_goes_on(distilled, tmp_path):
    first = Teacher(kill_at=6)
    with pytest.raises(KeyboardInterrupt):
        distilled(first)
    (tmp_path / "out" / "parts" / ".000000006.json.1.tmp").write_text('{"version": 1, "pai')
    second = Teacher()
    _, corpus = distilled(second)
    assert (len(first.seen), len(second.seen)) == (6, 1)
    assert corpus["train"] == PAIRS + CAPITALS
    third = Teacher()
    assert distilled(third)[0] == (14, 7)
    assert third.seen == []  # it is done
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json", "distilled.json",
        *(f"{name}.{side}" for name in SPLITS for side in ("en", "de")),
    }  # fmt: skip


def test_other_settings_or_another_folder_are_refused(distilled, tmp_path):
    distilled(Teacher())
    with pytest.raises(UserError, match=r"original is True there and False here"):
        distilled(Teacher(), original=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        distilled(Teacher(), folder=other)


REFERENCE = "the black cat sits on the mat"
BEAM = ["a dog is on the mat", "the black cat sits on a mat", "black cats sit on mats", ""]
ONE = {**SPLITS, "train": Lines([(b"die katze", REFERENCE.encode())])}


def test_the_hypothesis_nearest_to_the_reference(distilled):
    """By sentence BLEU: the second of four."""
    _, corpus = distilled(
        Teacher({"die katze": BEAM}), ONE, beam_size=4, choice="nearest", original=False
    )
    assert corpus["train"] == [(b"die katze", BEAM[1].encode())]


def test_several_hypotheses_become_pairs(distilled):
    """But none twice, and no empty one."""
    teacher = Teacher({"die katze": [BEAM[0], BEAM[0], *BEAM[2:]]})
    counts, corpus = distilled(teacher, ONE, beam_size=4, n_best=4, original=False)
    assert [target.decode() for _, target in corpus["train"]] == [BEAM[0], BEAM[2]]
    assert counts == (2, 2)


def test_what_cannot_be_translated_stays_as_it_was(distilled):
    """Bytes that are not UTF-8, and empty sides; the loader counts and leaves them out, as ever."""
    strange = [(b"\xff", b"x"), (b" ", b"y"), (b"good", b"gut")]
    teacher = Teacher()
    counts, corpus = distilled(teacher, {**SPLITS, "train": Lines(strange)})
    assert teacher.seen == ["good"]
    assert counts == (4, 1)
    assert corpus["train"] == [*strange, (b"good", b"GOOD")]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"choice": "worst"}, "--choice is 'worst'; allowed: best, nearest"),
        ({"n_best": 6}, "--n_best is 6; allowed: 1 to the beam, 5"),
        ({"choice": "nearest", "n_best": 2}, "--choice=nearest takes one hypothesis"),
    ],
)
def test_mistakes(fields, words):
    with pytest.raises(UserError, match=words):
        Distillation(**fields)
