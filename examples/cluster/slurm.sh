#!/bin/bash
# Features of many pictures on several nodes of a Slurm cluster: sbatch slurm.sh PICTURES OUTPUT
#SBATCH --job-name=loftup
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
set -eu
pictures=$1 output=$2  # on a file system that all nodes share, or URLs
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a node need ports of their own.
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }'):$((20000 + SLURM_JOB_ID % 20000))

# Ray starts on every node; the command runs on the first one, and Ray stops when it ends.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus 4 -- \
    loftup features "$pictures" -o "$output" --engine ray --address auto --gpus 1 --cpus 8 \
    --backbone dinov2_vits14 --weights any --save features,pooled
