"""The small Transformer of the literature on Multi30k English-German, by its published recipe.

python launch/train.py --config configs/multi30k_tiny.py --subnet=configs/multi30k_tiny.json
python launch/export.py --config configs/multi30k_tiny.py
python launch/evaluate.py --workdir=runs/multi30k_tiny --export=runs/multi30k_tiny/export \\
    --lowercase

"transformer-tiny" of Wu et al., "Good for Misconceived Reasons" (ACL 2021, arXiv 2105.14462): 4 + 4
layers of width 128 with 4 heads and FFNs of 256, one vocabulary of 10,000 merges (here of 10,000
pieces, characters included), at most 8,000 updates of 2 x 4,096 tokens, the last ten checkpoints
averaged; it has a BLEU of 41.02 on the test of 2016, lower-cased and tokenised.

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
    config.tokenizer.vocab_size = 10_000
    config.tokenizer.lowercase = True

    space = config.space
    space.qkv_dim = 128
    space.encoder_embed_dims = space.decoder_embed_dims = (128,)
    space.encoder_depths = space.decoder_depths = (4,)
    space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (4,)
    space.cross_spans = (1,)
    space.encoder_experts = space.decoder_experts = (1,)
    space.encoder_ffn_dims = space.decoder_ffn_dims = (256,)

    config.model.dropout = 0.3
    config.model.attention_dropout = 0.0
    subnet = config.subnet_training
    subnet.steps = 8000
    subnet.warmup_steps = 2000
    subnet.schedule = "inverse_sqrt"
    subnet.peak_rate = 5e-3
    subnet.tokens_per_batch = 4096
    subnet.batches_per_step = 2
    subnet.buckets = 6
    subnet.eval_every = 70  # an epoch
    subnet.checkpoint_every = 70
    subnet.keep_checkpoints = 10
    subnet.final_weights = "average"
    subnet.averaged_checkpoints = 10
    return config
