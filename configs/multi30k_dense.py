"""One dense Transformer on Multi30k, 512 wide: what benchmarks/cpu_throughput.py translates with.

python launch/train.py --config configs/multi30k_dense.py \\
    --subnet=configs/multi30k_dense.json

29,000 pairs, 8,000 subwords, 3 + 3 layers, 800 steps of 2,048 target tokens: 14 to 18 minutes on 2
cores.
"""

import os

from automoe_jax.config import base


def get_config():
    config = base()
    shared = os.environ.get("AUTOMOE_SHARED", "../shared")
    config.data.kind = "parallel_text"
    config.data.path = f"{shared}/data/multi30k"
    config.data.max_length = 64
    config.tokenizer.vocab_size = 8_000

    space = config.space
    space.encoder_embed_dims = space.decoder_embed_dims = (512,)
    space.encoder_depths = space.decoder_depths = (3,)
    space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (8,)
    space.cross_spans = (1,)
    space.encoder_experts = space.decoder_experts = (1,)
    space.encoder_ffn_dims = space.decoder_ffn_dims = (1024,)

    config.model.dropout = 0.2
    subnet = config.subnet_training
    subnet.steps = 800
    subnet.warmup_steps = 200
    subnet.peak_rate = 1e-3
    subnet.tokens_per_batch = 2048
    subnet.batches_per_step = 1
    subnet.buckets = 10
    subnet.eval_every = 200
    subnet.checkpoint_every = 200
    return config
