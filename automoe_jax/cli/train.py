"""Trains a supernet, or with --subnet one architecture of its space.

python launch/train.py --config configs/wmt14.py
python launch/train.py --config configs/wmt14.py --subnet best_1.json --init_from runs/wmt14
"""

import jax
from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.phases import dry_run
from automoe_jax.phases import run as phases
from automoe_jax.published import subnet_files
from automoe_jax.system import compile_cache, files, workdir
from automoe_jax.system.errors import UserError

CONFIG = ConfigFlag()
_WORKDIR = options.define_workdir()
_SUBNET = flags.DEFINE_string("subnet", None, "subnet file (JSON, or HAT's YAML) to train")
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "workdir whose supernet's weights the subnet inherits"
)
_OUT = flags.DEFINE_string("out", "subnet", "folder in the workdir for a trained subnet")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "compile the step on abstract inputs and print its size; no data is read"
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the other processes of a pod (jax.distributed) before training"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where the pod does not say (implies distributed)"
)
_PROCESSES = flags.DEFINE_integer("processes", None, "number of processes, with --coordinator")
_PROCESS = flags.DEFINE_integer("process", None, "number of this process, with --coordinator")


def main():
    config = CONFIG.load()
    _join()
    progress = terminal.TerminalProgress()
    subnet = None
    if _SUBNET.value:
        subnet = subnet_files.load(_SUBNET.value, config.space.qkv_dim)
        config.space.validate(subnet)
    elif _INIT_FROM.value:
        raise UserError("--init_from needs --subnet: a supernet starts from fresh weights")
    if _DRY_RUN.value:
        made = workdir.resolve(_WORKDIR.value or CONFIG.default_workdir) / "tokenizer"
        # The run's own where there is one: converted weights bring theirs.
        sizes = (
            tokenizers.load(made).vocab_sizes
            if made.is_dir()
            else tokenizers.vocab_sizes(config.tokenizer)
        )
        for line in dry_run.describe(config, sizes, subnet, progress):
            print(line)
        return
    run = phases.open_run(config, _WORKDIR.value or CONFIG.default_workdir)
    compile_cache.enable(run / phases.CACHE)
    if subnet is None:
        phases.train_supernet(config, run, progress)
        print(f"supernet trained: {run / phases.SUPERNET}")
        return
    init_from = files.expanded(_INIT_FROM.value).absolute() if _INIT_FROM.value else None
    phases.train_subnet(config, run, subnet, progress, init_from, _OUT.value)
    print(f"subnet trained: {run / _OUT.value}")


def _join():
    """Joins a pod's other processes; must come before anything asks JAX for devices."""
    if not (_DISTRIBUTED.value or _COORDINATOR.value):
        return
    if bool(_COORDINATOR.value) != (_PROCESSES.value is not None) or bool(_COORDINATOR.value) != (
        _PROCESS.value is not None
    ):
        raise UserError("--coordinator, --processes and --process go together")
    jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
