#!/bin/bash
# Five folds of one data set on a Slurm cluster, one job each, then nnU-Net's choice of configuration:
#
#   sbatch examples/slurm_five_folds.sh 118 nnUNetTrainerDermoMamba
#
# Submit it where nnUNetv2_train runs (environment activated; nnUNet_raw, nnUNet_preprocessed and nnUNet_results set);
# options of sbatch before the script override those below. Further arguments go to nnUNetv2_train, such as -p PLANS; a
# fold has one GPU.
#
# Five minutes before the time limit Slurm sends SIGTERM. The trainer then finishes its step, saves and exits with code
# 75; the job goes back into the queue, and on with --c. A job that Slurm itself requeues goes on with --c, too.
#SBATCH --job-name=dermomamba
#SBATCH --array=0-4
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dermomamba_%A_%a.log
set -uo pipefail

STOPPED=75  # the trainer's exit code where --c goes on
DATASET=${1:?usage: sbatch slurm_five_folds.sh DATASET [TRAINER [OPTIONS OF nnUNetv2_train]]}
TRAINER=${2:-nnUNetTrainerDermoMamba}
OPTIONS=("${@:3}")
PLANS=nnUNetPlans
for i in "${!OPTIONS[@]}"; do
    case ${OPTIONS[i]} in
        -p) PLANS=${OPTIONS[i + 1]} ;;
        -num_gpus) echo "one GPU a fold: with -num_gpus nnU-Net hides the exit code $STOPPED" >&2; exit 2 ;;
    esac
done

# The first task submits the last job, once: a requeued task has a restart count.
if [[ $SLURM_ARRAY_TASK_ID == "$SLURM_ARRAY_TASK_MIN" && -z ${SLURM_RESTART_COUNT:-} ]]; then
    sbatch --job-name=dermomamba_best --output="dermomamba_${SLURM_ARRAY_JOB_ID}_best.log" \
        --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes \
        --wrap="nnUNetv2_find_best_configuration $DATASET -c 2d -tr $TRAINER -p $PLANS"
fi

# --c starts anew where there is nothing to go on from. --npz: what nnUNetv2_find_best_configuration compares.
nnUNetv2_train "$DATASET" 2d "$SLURM_ARRAY_TASK_ID" -tr "$TRAINER" --npz --c ${OPTIONS[@]+"${OPTIONS[@]}"} &
training=$!
trap 'kill -TERM "$training"' TERM  # bash runs it only while it waits
wait "$training"
code=$?
if ((code > 128)); then  # the signal ended the wait, not the training
    wait "$training"
    code=$?
fi

if [[ $code == "$STOPPED" ]]; then
    exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
