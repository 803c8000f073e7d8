#!/bin/bash
# The whole table as a Slurm job array: 19 rows with 5 seeds each, one task for each of the 95 runs.
#
# Submit it from the folder of additional_experiments.py:
#
#     sbatch --gres=gpu:1 --time=2:00:00 runner/slurm_array.sh [options of additional_experiments.py]
#
# What a cluster asks for (GPU, time, memory, partition, account, another --array) goes before the script, on the
# command line of sbatch. PYTHON names another Python than the one in PATH. All tasks write into one folder of
# results. A task that was preempted is resumed by Slurm; after a time limit or scancel the same command resumes: what
# is finished is not trained again.

#SBATCH --job-name=spam-table
#SBATCH --array=1-95
#SBATCH --requeue
# A resumed task goes on writing into its slurm-JOB_TASK.out.
#SBATCH --open-mode=append
# Two minutes before the time limit, for the last checkpoint. B: to this script, which passes it on.
#SBATCH --signal=B:TERM@120

row=$(( (SLURM_ARRAY_TASK_ID - 1) % 19 + 1 ))
seed=$(( 123 + (SLURM_ARRAY_TASK_ID - 1) / 19 ))
checkpoint=row$row-seed$seed.ckpt

# As many threads as the task has CPUs: PyTorch would take all that it sees, and with another number of threads a
# resumed run may differ in the last digits.
export OMP_NUM_THREADS=$SLURM_CPUS_ON_NODE

# The whole table keeps 8.6 GB of frozen features; with less room its tasks would remove each other's files.
"${PYTHON:-python}" additional_experiments.py --feature_cache_gb 10 "$@" \
    --row "$row" --seed "$seed" --skip_finished --checkpoint "$checkpoint" &
trap 'kill -TERM $!' TERM
wait $!
status=$?
while kill -0 $! 2> /dev/null; do  # a signal ends `wait` before Python has written its checkpoint
    wait $!
    status=$?
done

# Without the record there is a checkpoint to resume from; with it, 118 GB of them would be of no use.
if [ $status -eq 0 ]; then rm -f "$checkpoint"; fi
exit $status
