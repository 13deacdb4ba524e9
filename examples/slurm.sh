#!/bin/bash
# Run the pipeline on several machines of a cluster, as one Slurm job:
#
#     sbatch --nodes 4 --gpus-per-node 8 examples/slurm.sh
#
# All machines must share the disk with the repository and .venv. The first machine runs DVC. It runs prepare, evaluate
# and sample alone, and starts train on all machines with torchrun. train.grad_accum must be a multiple of the number of
# GPUs. Two minutes before its time limit, Slurm signals the job. The training then saves a checkpoint, and the job is
# requeued to resume from it.

#SBATCH --job-name=minigpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

cd "$SLURM_SUBMIT_DIR" || exit 1
source .venv/bin/activate

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A restarted job must not connect to the addresses of the processes that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export MINIGPT_LAUNCH="srun --kill-on-bad-exit=1 torchrun --nnodes $SLURM_NNODES --nproc-per-node ${SLURM_GPUS_ON_NODE:-1}
    --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $first:29400 --max-restarts 3"

dvc repro "$@" &
dvc=$!
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$dvc"
status=$?
# The trap ends `wait` early, while the training still saves its checkpoint.
while kill -0 "$dvc" 2>/dev/null; do
    wait "$dvc"
    status=$?
done
[ -z "$stopped" ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
