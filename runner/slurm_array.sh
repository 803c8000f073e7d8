#!/bin/bash
# The whole table as a Slurm job array: 19 rows with 5 seeds each, one task for each of the 95 runs.
#
#     sbatch --gres=gpu:1 --time=2:00:00 runner/slurm_array.sh [options of additional_experiments.py]
#
# is submitted from the folder of additional_experiments.py. What a cluster asks for (GPU, time, memory, partition,
# account, another --array) goes before the script, on the command line of sbatch. PYTHON names another Python than
# the one in PATH. All tasks write into one folder of results. A task that was preempted is resumed by Slurm; after a time
# limit or scancel the same command resumes: what is finished is not trained again.

#SBATCH --job-name=spam-table
#SBATCH --array=1-95
#SBATCH --requeue
# A resumed task goes on writing into its slurm-JOB_TASK.out.
#SBATCH --open-mode=append
# Two minutes before the time limit, for the last checkpoint. B: to this script, which is Python by then.
#SBATCH --signal=B:TERM@120

row=$(( (SLURM_ARRAY_TASK_ID - 1) % 19 + 1 ))
seed=$(( 123 + (SLURM_ARRAY_TASK_ID - 1) / 19 ))

# As many threads as the task has CPUs: PyTorch would take all that it sees, and with another number of threads a
# resumed run may differ in the last digits.
export OMP_NUM_THREADS=$SLURM_CPUS_ON_NODE

# exec, because bash would not pass on the signals that ask for a checkpoint.
exec "${PYTHON:-python}" additional_experiments.py "$@" \
    --row "$row" --seed "$seed" --checkpoint "row$row-seed$seed.ckpt"
