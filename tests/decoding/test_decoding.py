"""Invariant 5: cached decoding, beam scores, and independence of batch and bucket."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    VOCAB,
    elastic_space,
    evolved_space,
    random_evolved,
    random_params,
    standalone_of,
    token_batch,
)

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.decoding import beam, evolved_engine, native, parts
from automoe_jax.decoding import native_engine as native_model
from automoe_jax.decoding import xla_engine as model
from automoe_jax.decoding.weights import pack, prepare
from automoe_jax.decoding.xla_engine import ModelSpec, Request
from automoe_jax.model.extract import extract

SPACE = elastic_space()
HULL = SPACE.hull()
PARAMS = random_params(SPACE)


def subnets():
    rng = np.random.default_rng(5)
    drawn = [SPACE.sample(rng) for _ in range(2)]
    return {"largest": SPACE.largest(), "smallest": SPACE.smallest(), "a": drawn[0], "b": drawn[1]}


ENGINES = {"xla": model, "native": native_model, "evolved": evolved_engine}
needs_kernels = pytest.mark.skipif(not native.available(), reason=native.reason())
KERNELS = [pytest.param("native", marks=needs_kernels), "xla"]


class Model:
    """A subnet ready to decode, with its teacher-forced model beside it."""

    def __init__(self, subnet, kernels, space=SPACE, params=None):
        self.engine, hull = ENGINES[kernels], space.hull()
        params = extract(PARAMS, subnet, hull) if params is None else params
        self.params = jax.tree.map(jnp.asarray, params)
        self.linen = standalone_of(space, subnet)
        self.spec = ModelSpec(subnet, hull.encoder.embed_dim, hull.decoder.embed_dim, space.gate)
        weights = prepare(self.params, subnet)
        weights = pack(weights) if kernels == "native" else weights
        self.weights = {k: jnp.asarray(v) for k, v in weights.items()}
        self.forced = jax.jit(
            lambda src, tgt: self.linen.apply({"params": self.params}, src, tgt).logits_BTV
        )
        self._search = {}

    def search(self, source, j=4, time=24, low=1, high=20, penalty=0.6):
        if j not in self._search:
            of = (self.engine, self.spec, VOCAB, j, self.weights)
            self._search[j] = jax.jit(functools.partial(beam.search, *of))
        out = self._search[j](
            source, np.arange(time, dtype=np.int32), np.int32(low), np.int32(high),
            np.float32(penalty),
        )  # fmt: skip
        return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module", params=KERNELS)
def kernels(request) -> str:
    return request.param


def models(*names):
    """Parameters of `small`: these subnets with both kernels, and evolved cells."""
    native = [pytest.param(("native", name), marks=needs_kernels) for name in names]
    xla = [
        pytest.param(("xla", name), marks=() if name == "largest" else pytest.mark.slow)
        for name in names
    ]
    return [*native, *xla, ("evolved", "")]


@pytest.fixture(scope="module", params=models(*sorted(subnets())), ids="-".join)
def small(request) -> Model:
    kind, name = request.param
    if kind == "evolved":
        space = evolved_space()
        return Model(space.largest(), kind, space, random_evolved())
    return Model(subnets()[name], kind)


@pytest.fixture(scope="module")
def one(kernels) -> Model:
    return Model(subnets()["a"], kernels)


def test_cached_logits_equal_teacher_forced_ones(small):
    check_cached_logits(small)


@pytest.mark.parametrize("gate", [pytest.param("count", marks=pytest.mark.slow), "normalised"])
def test_cached_logits_with_other_gates(kernels, gate):
    """The largest has two experts a token, so that their probabilities are renormalised."""
    check_cached_logits(Model(SPACE.largest(), kernels, elastic_space(gate=gate)))


def check_cached_logits(small):
    rng = np.random.default_rng(0)
    src, tgt = token_batch(rng)
    tgt = rng.integers(4, VOCAB, tgt.shape).astype(np.int32)
    tgt[:, 0] = EOS_ID
    logits = np.asarray(small.forced(src, tgt))
    forced = np.asarray(jax.nn.log_softmax(logits))

    @jax.jit
    def cached(src, tgt):
        """Log probabilities, from all words as candidates."""
        memory = small.engine.start(small.weights, small.spec, src)
        rows, time = tgt.shape
        caches = small.engine.empty_caches(small.spec, rows, time)
        own = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None, None], (rows, 1, time))
        steps = []
        for i in range(time):
            never = jnp.bool_(False)
            request = Request(
                tgt[:, i : i + 1], jnp.int32(i), own[:, 0, 0], own, jnp.int32(rows), never, never,
                VOCAB, VOCAB,
            )  # fmt: skip
            x_RD, caches = small.engine.decode(small.weights, small.spec, request, caches, memory)
            found = small.engine.candidates(small.weights, x_RD, request, memory)
            log_p = (found.logit_BJC - found.log_z_BJ[..., None])[:, 0]
            by_word = jnp.full((rows, VOCAB), model.NEVER)
            steps.append(by_word.at[jnp.arange(rows)[:, None], found.word_BJC[:, 0]].max(log_p))
        return jnp.stack(steps, axis=1)

    got = np.asarray(cached(src, tgt))
    words = np.arange(VOCAB) != PAD_ID  # never a candidate
    tolerance = 1e-5 * np.abs(logits).max()
    np.testing.assert_allclose(got[..., words], forced[..., words], atol=tolerance, rtol=0)


def forced_log_p(m: Model, source_row, tokens) -> np.ndarray:
    """log p of every word after eos and each of the tokens; always one shape, to compile once."""
    target_in = np.full((1, 24), PAD_ID, np.int32)
    target_in[0, : len(tokens) + 1] = (EOS_ID, *tokens)
    logits = np.asarray(m.forced(source_row[None], target_in)[0], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def forced_score(m: Model, source_row, tokens, penalty) -> float:
    """Score of forcing tokens (eos included), by the teacher-forced model."""
    log_p = forced_log_p(m, source_row, tokens[:-1])
    total = sum(float(log_p[i, t]) for i, t in enumerate(tokens))
    return total / len(tokens) ** penalty


def test_beam_score_is_the_score_of_forcing_its_tokens(small):
    src, _ = token_batch(np.random.default_rng(1))
    out = small.search(src)
    for b in range(len(src)):
        for j in range(2):
            tokens = out.tokens_BJT[b, j, : out.length_BJ[b, j]]
            assert tokens[-1] == EOS_ID
            assert EOS_ID not in tokens[:-1]
            assert PAD_ID not in tokens
            expected = forced_score(small, src[b], tokens, 0.6)
            assert out.score_BJ[b, j] == pytest.approx(expected, abs=1e-4)
        assert (np.diff(out.score_BJ[b]) <= 0).all()


def naive_beam(m: Model, source_row, j, low, high, penalty):
    """The same search, hypothesis by hypothesis, with the teacher-forced model."""
    running, ended = [((), 0.0)], []
    for step in range(high + 1):
        candidates = []
        for tokens, score in running:
            log_p = forced_log_p(m, source_row, tokens)[len(tokens)]
            log_p[PAD_ID] = -np.inf
            if step < low:
                log_p[EOS_ID] = -np.inf
            if step >= high:
                log_p[np.arange(VOCAB) != EOS_ID] = -np.inf
            candidates += [(score + log_p[v], tokens, v) for v in range(VOCAB) if log_p[v] > -1e9]
        candidates.sort(key=lambda c: -c[0])
        candidates = candidates[: 2 * j]
        for score, tokens, v in candidates[:j]:
            if v == EOS_ID and len(ended) < j:
                ended.append((score / (step + 1) ** penalty, (*tokens, v)))
        if len(ended) == j:
            break
        running = [((*t, v), s) for s, t, v in candidates if v != EOS_ID][:j]
    return sorted(ended, key=lambda e: -e[0])


@pytest.mark.parametrize(
    ("j", "low", "high", "penalty"), [(1, 1, 6, 0.6), (3, 1, 6, 1.0), (4, 3, 3, 0.0)]
)
def test_beam_search_equals_a_naive_one(one, j, low, high, penalty):
    src, _ = token_batch(np.random.default_rng(2))
    out = one.search(src, j, time=high + 1, low=low, high=high, penalty=penalty)
    assert out.complete_B.all()
    for b in range(len(src)):
        expected = naive_beam(one, src[b], j, low, high, penalty)
        got = [
            (out.score_BJ[b, k], tuple(out.tokens_BJT[b, k, : out.length_BJ[b, k]]))
            for k in range(j)
            if out.score_BJ[b, k] > beam.NEVER / 2
        ]
        assert [t for _, t in got] == [t for _, t in expected]
        np.testing.assert_allclose([s for s, _ in got], [s for s, _ in expected], atol=1e-4)


def test_batch_bucket_and_time_do_not_matter(small):
    src, _ = token_batch(np.random.default_rng(3), rows=4)
    together = small.search(src)
    wide = np.pad(src, ((0, 4), (0, 7)), constant_values=PAD_ID)  # more rows, more time
    padded = small.search(wide, time=32)
    for b in range(len(src)):
        alone = small.search(src[b : b + 1])
        n = together.length_BJ[b, 0]
        for other, row in ((padded, b), (alone, 0)):
            np.testing.assert_array_equal(
                other.tokens_BJT[row, 0, :n], together.tokens_BJT[b, 0, :n]
            )
            np.testing.assert_allclose(other.score_BJ[row], together.score_BJ[b], atol=1e-4)


def test_too_little_time_is_told(one):
    src, _ = token_batch(np.random.default_rng(4))
    out = one.search(src, time=4, low=6, high=8)
    assert not out.complete_B.any()
    assert one.search(src, time=9, low=6, high=8).complete_B.all()


def test_length_limits(one):
    src, _ = token_batch(np.random.default_rng(6))
    out = one.search(src, low=5, high=5, time=6)
    assert (out.length_BJ == 6).all()


@pytest.mark.parametrize("small", models("largest"), indirect=True, ids="-".join)
def test_parts_end_with_the_last_words_of_the_model(small):
    """After the drawn words of each hypothesis, which differ, as the teacher-forced model says."""
    source = jnp.asarray(token_batch(np.random.default_rng(0))[0])
    beams, steps = 3, 6
    words = parts.words(VOCAB, len(source), beams, steps)
    assert len({tuple(w) for w in words.reshape(steps, -1).T}) == len(source) * beams
    encoder, layers, output = parts.programs(small.engine, small.spec, VOCAB, beams)
    given = small.weights, source, words
    (x_RD, _, total), memory = layers(*given)
    assert jax.tree.structure(encoder(*given)) == jax.tree.structure(memory)
    (again_RD, found, more), _ = output(*given)
    np.testing.assert_allclose(x_RD, again_RD, atol=1e-5 * np.abs(x_RD).max())
    assert np.isfinite(more - total)
    for j in range(beams):
        logits_BTV = small.forced(source, words[:, :, j].T)
        best_B = np.argmax(np.where(np.arange(VOCAB) == PAD_ID, -np.inf, logits_BTV[:, -1]), -1)
        np.testing.assert_array_equal(found.word_BJC[:, j, 0], best_B)
