"""Multi30k English-German (29,000 pairs) on a small machine.

python launch/pipeline.py --config configs/multi30k.py --config.data.path=DIR
python launch/train.py --config configs/multi30k.py --config.data.path=DIR     # the supernet alone

One FFN of 512 in 3 + 2 layers, trained from scratch for 1,500 updates at a peak rate of 4e-3 (9
minutes of one core beside another training), has a test BLEU of 33.2. See docs/experts.md for the
scales, docs/search.md for the choices.

DIR holds train, valid and test .en and .de, plain or .gz. Without --config.data.path the folder is
$AUTOMOE_SHARED/data/multi30k, ../shared/data/multi30k by default.
"""

import os

from automoe_jax.config import base


def get_config():
    config = base()
    shared = os.environ.get("AUTOMOE_SHARED", "../shared")
    config.data.kind = "parallel_text"
    config.data.path = f"{shared}/data/multi30k"
    config.data.max_length = 64
    config.tokenizer.vocab_size = 6_000

    space = config.space
    space.qkv_dim = 128
    # What bought nothing in a wider space is fixed (docs/search.md): heads, spans, encoder width.
    space.encoder_embed_dims = (128,)
    space.decoder_embed_dims = (128, 192)
    space.encoder_depths = (2, 4, 6)
    space.decoder_depths = (1, 2, 3)
    space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (4,)
    space.cross_spans = (1,)
    space.encoder_experts = space.decoder_experts = (1, 2, 3)
    space.encoder_ffn_dims = space.decoder_ffn_dims = (256, 512, 1024)
    # Small branches learn much sooner (docs/experts.md).
    space.ffn_scale = 0.25
    space.attention_scale = 0.5

    config.model.dropout = 0.2
    training = config.training
    training.steps = 2500
    training.warmup_steps = 400
    training.peak_rate = 4e-3
    training.tokens_per_batch = 1536
    training.batches_per_step = 1
    training.buckets = 8
    training.eval_every = 500
    training.checkpoint_every = 250

    subnet = config.subnet_training
    subnet.update(training)
    subnet.steps = 1500
    subnet.warmup_steps = 100
    subnet.peak_rate = 2e-3

    search = config.search
    search.iterations = 4
    search.population = 24
    search.parents = 6
    search.mutations = 8
    search.crossovers = 8
    search.keep = 2
    search.latency_runs = 200
    config.search.constraint.latency_ratio = 0.7
    config.pipeline.inherit = True
    config.pipeline.train_random = True
    return config
