"""The whole way in minutes on two CPU cores, without a download.

python launch/pipeline.py --config configs/quickstart.py

Two CPU cores take 6 to 7 minutes.
"""

from automoe_jax.config import base


def get_config():
    config = base()
    config.data.kind = "phrases"
    config.data.train_pairs = 30_000
    config.data.valid_pairs = 400
    config.data.test_pairs = 200
    config.data.max_length = 64
    config.tokenizer.vocab_size = 2_000
    config.tokenizer.split_digits = True
    config.tokenizer.max_sentences = 40_000

    space = config.space
    space.qkv_dim = 128
    space.encoder_embed_dims = (128,)
    space.decoder_embed_dims = (96, 128)
    space.encoder_depths = (2,)
    space.decoder_depths = (1, 2, 3)
    space.encoder_heads = space.decoder_self_heads = space.decoder_cross_heads = (4,)
    space.cross_spans = (1,)
    space.ffn_scale = 0.25
    space.attention_scale = 0.5
    space.encoder_experts = space.decoder_experts = (1, 2, 3)
    space.encoder_ffn_dims = space.decoder_ffn_dims = (128, 256, 384)

    config.model.dropout = 0.0  # the corpus has no end
    config.model.attention_dropout = 0.0
    training = config.training
    training.steps = 1200
    training.warmup_steps = 100
    training.peak_rate = 4e-3
    training.tokens_per_batch = 320  # many small steps learn this corpus soonest
    training.batches_per_step = 1
    training.buckets = 2
    training.eval_every = 0
    training.eval_pairs = 200
    training.eval_subnets = 1
    training.checkpoint_every = 400

    subnet = config.subnet_training
    subnet.update(training)
    subnet.steps = 1000  # 20 ms each
    subnet.warmup_steps = 50
    subnet.peak_rate = 3e-3

    search = config.search
    search.iterations = 1
    search.population = 20
    search.parents = 5
    search.mutations = 3
    search.crossovers = 3
    search.keep = 2
    search.retreats = 1  # each times another 20 to 30 subnets
    search.eval_pairs = 150
    search.latency_runs = 30
    search.latency = "partially_gold"  # a latency model would take longer than the search
    config.search.constraint.latency_ratio = 0.7
    config.latency.runs = 100

    config.export.beam_sizes = (1, 5)
    config.pipeline.inherit = True
    config.pipeline.train_random = True
    config.pipeline.valid_sentences = 150
    return config
