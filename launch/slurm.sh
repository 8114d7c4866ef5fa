#!/usr/bin/env bash
# Trains on the nodes of a Slurm job:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/NAME.py --workdir=/shared/runs/one [flags of launch/run.py …]
#
# From the project's folder, which all nodes share, as they do --workdir. One task per node drives all of its GPUs; with
# `--ntasks-per-node=8 --cpus-per-task=4` before the script's name, each task takes one. PYTHON names an interpreter
# other than .venv's.
# Ten minutes before the time is up, or before a preemption with grace, the step under way is finished and saved, and
# the job queued again: an evaluation, a step and a checkpoint have to fit into them, or --signal be longer. A task that
# dies is started again by itself; when one gives up, all end.
#SBATCH --job-name=advgame
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=advgame-%j.log
set -uo pipefail

refuse() { echo "error: $1" >&2; exit 2; }

[[ ${SLURM_JOB_ID:-} ]] || refuse "this is no job of Slurm; allowed: sbatch --nodes=N $0 --config=… --workdir=…"
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || command -v "$python" >/dev/null || refuse "there is no $python in $PWD; allowed: PYTHON=… that all nodes have"
[[ -f launch/run.py ]] || refuse "there is no launch/run.py in $PWD; allowed: sbatch from the project's folder"
[[ " $* " == *" --workdir="* ]] || refuse "--workdir is missing; allowed: a folder that all nodes share"

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over by itself
# --kill-on-bad-exit: a task that has used up its restarts, or found something to mend, takes the others with it.
srun --kill-on-bad-exit=1 "$python" -u launch/run.py --max-restarts=10 "$@" &
step=$!
stopped=''
trap 'stopped=1; kill -TERM "$step"' TERM # srun hands it to its tasks
code=127
while kill -0 "$step" 2>/dev/null; do # a trap ends a wait
  wait "$step"
  code=$?
done
if [[ $stopped && ($code == 0 || $code == 143) ]]; then # 143: before there was anything to save
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
