"""Trains a supernet, or with --subnet one architecture of its space.

python launch/train.py --config configs/wmt14.py
python launch/train.py --config configs/wmt14.py --subnet best_1.json --init_from runs/wmt14
"""

import jax
from absl import flags

from automoe_jax.cli.run_flags import RunFlags, named_folder
from automoe_jax.phases import dry_run, train
from automoe_jax.phases.run import check_out
from automoe_jax.published import subnet_files
from automoe_jax.system.errors import UserError
from automoe_jax.training.clock import Span

CONFIG = RunFlags()
_SUBNET = flags.DEFINE_string("subnet", None, "subnet file (JSON, or HAT's YAML) to train")
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "workdir whose supernet's weights the subnet inherits, or whose trained subnet, "
    "which differs in experts alone, it starts from (sparse upcycling); without --subnet, "
    "the workdir whose trained subnet, of the same space, a supernet starts from",
)
_TEACHER = flags.DEFINE_string(
    "teacher",
    None,
    "export, workdir or WORKDIR/supernet (its largest subnet) whose predictions the subnet learns "
    "from, by subnet_training.teacher_weight",
)
_OUT = flags.DEFINE_string("out", "subnet", "folder in the workdir for a trained subnet")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "compile the step on abstract inputs and print its size; no data is read"
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "with --dry_run, TPUs to compile for, as v5e:2x4; none need be here"
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "FROM:TO, steps to trace for XProf, into plugins/profile/ of the folder"
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
    profile = _profiled()
    _join()
    subnet = None
    if _SUBNET.value:
        subnet = subnet_files.load(_SUBNET.value, config.space.qkv_dim)
        config.space.validate(subnet)
    elif _TEACHER.value:
        raise UserError("--teacher needs --subnet: a supernet's subnets learn from its largest")
    if subnet is None and _OUT.present:
        raise UserError("--out names the folder of a subnet: it goes with --subnet")
    if _DRY_RUN.value and _TEACHER.value:
        raise UserError("--dry_run counts the model alone; leave --teacher out")
    if _TOPOLOGY.value and not _DRY_RUN.value:
        raise UserError("--topology compiles for TPUs that are not here; it goes with --dry_run")
    if _TOPOLOGY.value:
        jax.config.update("jax_platforms", "cpu")  # libtpu would be asked for a TPU of this machine
    if _DRY_RUN.value:
        for line in dry_run.describe(CONFIG.run(config), subnet, _TOPOLOGY.value or ""):
            print(line)
        return
    if subnet is not None:
        check_out(CONFIG.run(config), _OUT.value)
    run = CONFIG.open_run(config)
    init_from, teacher = named_folder(_INIT_FROM), named_folder(_TEACHER)
    if subnet is None:
        train.train_supernet(run, init_from, profile)
        print(f"supernet trained: {run.supernet}")
        return
    train.train_subnet(run, subnet, init_from, _OUT.value, profile, teacher=teacher)
    print(f"subnet trained: {run.path / _OUT.value}")


def _profiled() -> Span | None:
    """The steps of --profile."""
    if not _PROFILE.value:
        return None
    first, _, last = _PROFILE.value.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile is {_PROFILE.value}; give two steps, as --profile=20:25")
    return int(first), int(last)


def _join():
    """Joins a pod's other processes; must come before JAX is asked for devices."""
    address, count, number = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    if len({address is None, count is None, number is None}) > 1:
        raise UserError("--coordinator, --processes and --process go together")
    if address is None and not _DISTRIBUTED.value:
        return
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator is {address!r}; give HOST:PORT of process 0")
    if count is not None and number is not None and not 0 <= number < count:
        raise UserError(f"--process is {number} of --processes {count}; allowed: 0 to {count - 1}")
    try:
        jax.distributed.initialize(address, count, number)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"joining the other processes failed: {e}") from None
