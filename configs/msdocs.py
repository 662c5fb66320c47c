"""English-German software documentation (174,000 pairs, 14 words a line) on a small machine.

python launch/pipeline.py --config configs/msdocs.py --config.data.path=DIR
python launch/train.py --config configs/msdocs.py --config.data.path=DIR     # the supernet alone

One FFN of 512 in 3 + 2 layers, trained from scratch by `benchmarks/experts_pay.py` (4,800 updates,
50 minutes on one core beside another training), has a test BLEU of 35.1; eight experts of 512 have
35.2. See docs/experts.md.

DIR holds train, valid and test .en and .de, plain or .gz. Without --config.data.path the folder is
$AUTOMOE_SHARED/data/msdocs-ende, ../shared/data/msdocs-ende by default.
"""

import os

from automoe_jax.config import base


def get_config():
    config = base()
    shared = os.environ.get("AUTOMOE_SHARED", "../shared")
    config.data.kind = "parallel_text"
    config.data.path = f"{shared}/data/msdocs-ende"
    config.data.max_length = 64
    config.tokenizer.vocab_size = 8_000

    space = config.space
    space.qkv_dim = 128
    # As in configs/multi30k.py: heads, spans and the encoder's width buy nothing and are fixed
    # (docs/search.md).
    space.encoder_embed_dims = (128,)
    space.decoder_embed_dims = (128, 192)
    space.encoder_depths = (2, 4, 6)
    space.decoder_depths = (1, 2, 3)
    space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (4,)
    space.cross_spans = (1,)
    space.encoder_experts = space.decoder_experts = (1, 2, 4)
    space.encoder_ffn_dims = space.decoder_ffn_dims = (256, 512, 1024)
    # Small branches learn much sooner (docs/experts.md).
    space.ffn_scale = 0.25
    space.attention_scale = 0.5

    # At limits that leave room for three decoder layers, what search finds then is 1.5 to 2.5 BLEU
    # better (docs/training.md, "Decoder depths"); under one that only one layer meets: 0.
    config.sampling.depth_bias = 2.0
    config.model.dropout = 0.1
    config.model.attention_dropout = 0.0
    training = config.training
    training.steps = 2400
    training.warmup_steps = 400
    training.peak_rate = 4e-3
    training.tokens_per_batch = 3072
    training.batches_per_step = 1
    training.buckets = 6
    training.eval_every = 600
    training.checkpoint_every = 300
    config.subnet_training.update(training)

    search = config.search
    search.iterations = 4
    search.population = 24
    search.parents = 6
    search.mutations = 8
    search.crossovers = 8
    search.keep = 2
    search.latency_runs = 200
    config.search.constraint.latency_ratio = 0.8
    config.pipeline.inherit = True
    config.pipeline.train_random = True
    return config
