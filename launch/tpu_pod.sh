#!/usr/bin/env bash
# Trains on all hosts of a TPU pod slice, or looks at, or stops, what runs there.
#
#   launch/tpu_pod.sh start --name=NAME --zone=ZONE [--project=PROJECT] [--folder=advgame_jax] [--python=.venv/bin/python] \
#     -- --config=configs/NAME.py --workdir=/mnt/shared/runs/one [flags of launch/run.py …]
#   launch/tpu_pod.sh watch --name=NAME --zone=ZONE …   follows the log of host 0; Ctrl-C leaves the run alone
#   launch/tpu_pod.sh stop  --name=NAME --zone=ZONE …   SIGTERM: the step under way is finished and saved
#
# Needed: gcloud, logged in; on every host the same code and the same files at --folder (from the home folder) with the
# packages in --python; --workdir on a file system that all hosts mount. The run does not depend on this terminal. It
# restarts itself after a fault, 10 times unless --max-restarts=N is given. The same command again continues it.
# Several slices: run it for each; hosts know of the other slices by the environment of their queued resource.
# shellcheck disable=SC2016  # what is in single quotes is for the hosts
set -euo pipefail

refuse() { echo "error: $1" >&2; exit 2; }

action=${1:-}
case $action in
  start | watch | stop) shift ;;
  -h | --help) sed -n '2,/^# shellcheck/{/shellcheck/d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  *) refuse "'$action' is no action; allowed: start, watch, stop (the header of $0 shows how)" ;;
esac
name='' zone='' project='' folder=advgame_jax python=.venv/bin/python
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --folder=*) folder=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --) shift; break ;;
    *) refuse "'$1' is no flag of $0; allowed: --name, --zone, --project, --folder, --python, each with =, and flags of launch/run.py after --" ;;
  esac
  shift
done
[[ $name ]] || refuse "--name is missing; allowed: the name of a TPU VM, as \`gcloud compute tpus tpu-vm list\` shows it"
[[ $zone ]] || refuse "--zone is missing; allowed: the zone of the TPU VM, as us-east5-a"
if [[ $action == start ]]; then
  workdir='' restarts=--max-restarts=10
  for flag in "$@"; do
    case $flag in
      --workdir=*) workdir=${flag#*=} ;;
      --max-restarts=* | --max_restarts=*) restarts='' ;;
    esac
  done
  [[ $workdir == /* ]] || refuse "--workdir is '$workdir'; allowed, after --: a folder that all hosts mount at the same absolute path"
elif (($#)); then
  refuse "$action takes no flags of launch/run.py; allowed: --name, --zone, --project, --folder"
fi
command -v gcloud >/dev/null || refuse "gcloud is not installed here; allowed: https://cloud.google.com/sdk/docs/install"

at=("$name" "--zone=$zone" ${project:+"--project=$project"})
state=$(gcloud compute tpus tpu-vm describe "${at[@]}" '--format=value(state)') ||
  refuse "gcloud finds no TPU VM $name in $zone${project:+ of $project}; allowed: --project, and one of \`gcloud compute tpus tpu-vm list --zone=$zone\`"
[[ $state == READY ]] || refuse "the TPU VM $name is $state; allowed: READY"
on() { gcloud compute tpus tpu-vm ssh "${at[@]}" "--worker=$1" "--command=$2"; }

case $action in
  start)
    printf -v flags ' %q' ${restarts:+"$restarts"} "$@"
    printf -v checks 'cd %q && test -f launch/run.py && test -x %q && mkdir -p %q && test -w %q' "$folder" "$python" "$workdir" "$workdir"
    on all "$checks" || refuse "not every host has $folder/launch/run.py, $folder/$python and a folder $workdir to write in"
    # As a session of its own it outlives this connection; what is running already is not started again.
    printf -v remote 'cd %q; if kill -0 "$(cat run.pid 2>/dev/null)" 2>/dev/null; then echo "$(hostname): runs already"; else setsid nohup %q -u launch/run.py%s >>run.log 2>&1 </dev/null & echo $! >run.pid; echo "$(hostname): started"; fi' "$folder" "$python" "$flags"
    on all "$remote"
    ;;
  watch) on 0 "$(printf 'cd %q && tail -n 20 --pid="$(cat run.pid)" -F run.log' "$folder")" ;;
  stop) on all "$(printf 'cd %q && kill -TERM "$(cat run.pid)"' "$folder")" ;;
esac
