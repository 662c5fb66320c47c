"""A whole run at the smallest sizes, and a progress that kills it."""

from automoe_jax.config import base, resolve
from automoe_jax.system.progress import Silent


def tiny_config(**constraint):
    config = base()
    config.data.update(train_pairs=400, valid_pairs=40, test_pairs=12, max_length=60)
    config.tokenizer.update(vocab_size=300, split_digits=True)
    config.space.update(
        qkv_dim=8, encoder_embed_dims=(8, 12), decoder_embed_dims=(8,), encoder_depths=(1,),
        decoder_depths=(1, 2), encoder_heads=(1, 2), decoder_self_heads=(2,),
        decoder_cross_heads=(2,), cross_spans=(1,), encoder_experts=(1, 2), decoder_experts=(1, 2),
        encoder_ffn_dims=(8, 16), decoder_ffn_dims=(8, 16), ffn_scale=0.5, attention_scale=0.8,
    )  # fmt: skip
    config.training.update(
        steps=8, warmup_steps=2, tokens_per_batch=256, batches_per_step=4, buckets=1, log_every=2,
        eval_every=0, eval_pairs=20, eval_subnets=1, checkpoint_every=4,
    )  # fmt: skip
    config.subnet_training.update(config.training, steps=4)
    config.search.update(
        iterations=2, population=6, parents=2, mutations=2, crossovers=2, keep=2, eval_pairs=20,
        latency_runs=3,
    )  # fmt: skip
    config.search.constraint.update(constraint or {"gflops": 2.5e-4})
    config.predictor.update(subnets=8, held_out=2, runs=5)
    config.latency.update(runs=6, warmup=1, source_length=8, target_length=6, beam_size=2)
    config.export.beam_sizes = (2,)
    config.pipeline.update(inherit=True, valid_sentences=6)
    return resolve(config)


def tiny_flags() -> list[str]:
    """Flags of programs that train a tiny supernet of configs/quickstart.py for 6 steps."""
    settings = {
        "data.train_pairs": 300, "data.valid_pairs": 20, "data.test_pairs": 10,
        "tokenizer.vocab_size": 300, "space.encoder_embed_dims": "(8,)",
        "space.decoder_embed_dims": "(8,)", "space.qkv_dim": 8, "space.encoder_ffn_dims": "(8,16)",
        "space.decoder_ffn_dims": "(8,16)", "training.steps": 6, "training.warmup_steps": 1,
        "training.log_every": 2, "training.buckets": 1, "training.eval_every": 3,
        "training.checkpoint_every": 3,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["--config", "configs/quickstart.py", *flags]


class Killed(Exception):
    """Stands for a kill."""


class KillAt(Silent):
    """Kills the run when a note contains some words; keeps the notes."""

    def __init__(self, words: str):
        self._words, self.notes = words, []

    def note(self, text: str):
        self.notes.append(text)
        if self._words in text:
            raise Killed
