#!/bin/bash
# The pipeline on several machines of a cluster, as one job of Slurm:
#
#     sbatch --nodes 4 --gpus-per-node 8 examples/slurm.sh
#
# The repository and .venv lie on a disk that all machines share. The first machine runs DVC: prepare, evaluate and
# sample alone, train through torchrun on all. Set train.grad_accum to a multiple of the number of GPUs. Slurm warns
# two minutes before the job's time is up; the training saves, and the job goes back to the queue to go on from there.

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
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a restarted job must not find the addresses of the one that died
export MINIGPT_LAUNCH="srun --kill-on-bad-exit=1 torchrun --nnodes $SLURM_NNODES --nproc-per-node ${SLURM_GPUS_ON_NODE:-1}
    --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $first:29400 --max-restarts 3"

dvc repro "$@" &
dvc=$!
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$dvc"
status=$?
while kill -0 "$dvc" 2>/dev/null; do  # a trap ends wait early: the training is saving
    wait "$dvc"
    status=$?
done
[ -z "$stopped" ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
