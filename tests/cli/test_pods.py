"""Two processes with two devices each are one with four."""

import pytest
from pods import train
from quick_compilation import FLAGS

# Of configs/quickstart.py; its space, with less to compile.
SMALL = [
    "--config", "configs/quickstart.py", "--config.data.train_pairs=400",
    "--config.data.valid_pairs=40", "--config.tokenizer.vocab_size=300",
    "--config.space.encoder_depths=1", "--config.space.decoder_depths=1",
    "--config.training.steps=6", "--config.training.warmup_steps=2",
    "--config.training.tokens_per_batch=256", "--config.training.batches_per_step=4",
    "--config.training.buckets=1", "--config.training.eval_every=0",
    "--config.training.log_every=1", "--config.training.eval_subnets=1",
]  # fmt: skip


def test_two_processes_of_two_devices_are_one_of_four(tmp_path):
    pod = train(SMALL, tmp_path / "pod", processes=2, devices=2, xla=FLAGS)
    one = train(SMALL, tmp_path / "one", processes=1, devices=4, xla=FLAGS)
    assert (6, "valid/loss_largest") in pod
    assert pod.keys() == one.keys()
    for key, value in pod.items():
        assert value == pytest.approx(one[key], rel=1e-5), key
