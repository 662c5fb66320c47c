#!/bin/bash
# Trains a supernet on the GPU nodes of a SLURM cluster: sbatch launch/slurm/train.sh
# One process for each GPU: JAX reads from SLURM's variables which it is, and takes the GPU of its
# number on the node.
#SBATCH --job-name=automoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

CONFIG=${CONFIG:-configs/wmt14.py}
WORKDIR=${WORKDIR:-$PWD/runs/wmt14} # on a file system that all nodes share

# SLURM sends SIGTERM two minutes before the end; the run saves and ends with 143, and the job is
# queued again. After a lost node SLURM queues it itself, and the run goes on from its newest
# checkpoint.
code=0
srun --kill-on-bad-exit=1 \
  python launch/train.py --config "$CONFIG" --workdir "$WORKDIR" --distributed "$@" || code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
