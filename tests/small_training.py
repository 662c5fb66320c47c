"""A tiny training, whole or killed."""

import numpy as np
from conftest import elastic_space

from automoe_jax.data import tokens
from automoe_jax.data.tokens import PreparedData
from automoe_jax.system.progress import Silent
from automoe_jax.training import loop, metrics
from automoe_jax.training.config import ModelConfig, SamplingConfig, TrainingConfig
from automoe_jax.training.target import TrainingTarget

TINY = elastic_space(
    encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,), encoder_top_k=(1,),
    decoder_top_k=(1,), encoder_experts=(1, 2), decoder_experts=(1, 2),
)  # fmt: skip
PUBLISHED = SamplingConfig()
CONFIG = TrainingConfig(
    steps=6, warmup_steps=2, tokens_per_batch=40, batches_per_step=4, buckets=1, log_every=3,
    eval_every=3, checkpoint_every=2, eval_subnets=1, peak_rate=1e-2,
)  # fmt: skip


class FakeTokenizer:
    vocab_sizes = (64, 64)


def copy_pairs(n=80) -> tokens.TokenPairs:
    """A corpus whose target is its source."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 8, n)
    ids = rng.integers(4, 64, lengths.sum()).astype(np.uint16)
    starts = np.cumsum([0, *lengths])
    ids[starts[1:] - 1] = 2
    return tokens.TokenPairs(tokens.Side(ids, starts), tokens.Side(ids, starts), {})


DATA = PreparedData(FakeTokenizer(), copy_pairs(), copy_pairs(20))  # type: ignore[arg-type]


class Killed(Exception):
    """A simulated kill."""


class KillAt(Silent):
    """Kills the run at a step, None for never; keeps the steps."""

    def __init__(self, step):
        self._step, self.steps = step, []

    def task(self, name, total):
        outer = self

        class Task:
            def update(self, done, **fields):
                outer.steps.append(done)
                if done == outer._step:
                    raise Killed

            def close(self):
                pass

        return Task()


def run_training(
    folder,
    progress=None,
    subnet=None,
    dropout=0.1,
    config=CONFIG,
    rules=PUBLISHED,
    space=TINY,
    **kwargs,
):
    target = TrainingTarget(space, (64, 64), ModelConfig(dropout, dropout), subnet)
    loop.train(target, config, rules, 7, DATA, folder, progress or Silent(), **kwargs)
    return {
        (line["step"], line["name"]): line["value"]
        for line in metrics.read(folder)
        if not line["name"].endswith("_s") and not line["name"].startswith("run/")
    }
