#!/bin/bash
# A cohort on a Slurm cluster with Apptainer, one job of the array for each share of the cases:
#
#     apptainer build cwdm.sif docker-archive:cwdm.tar     # docker save cwdm:latest -o cwdm.tar, on a machine with Docker
#     DATA=$PWD/input OUT=$PWD/output sbatch --array=0-7 mlcube/slurm/job.sh
#
# A job that is stopped goes back into the queue and on where it was: finished cases are skipped.
#SBATCH --job-name=cwdm
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --output=cwdm-%A_%a.log
set -euo pipefail
: "${DATA:?folder of the cases}" "${OUT:?folder for the results}"
mkdir -p "$OUT"
index=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
exec srun apptainer run --nv --containall --bind "$DATA:/input:ro" --bind "$OUT:/output" \
    "${IMAGE:-cwdm.sif}" infer --shard "$index/$SLURM_ARRAY_TASK_COUNT"
