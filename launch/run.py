"""Trains: python launch/run.py --config=configs/microworld.py --workdir=runs/microworld [--config.name=value …]

The same command again continues a run that was stopped. On several hosts, the same command on each: TPU pods, Slurm,
Open MPI and indexed Kubernetes jobs are recognised; elsewhere --coordinator=HOST:PORT --processes=N --process=I say it
(docs/pods.md). Exit code 2: something to mend, in one sentence; 3: another process is gone, and the same command goes
on, by itself with --max-restarts=N.
"""

import sys

from advgame_jax import large_pages, supervise

if __name__ == "__main__":
  large_pages.ask()
  supervise.supervise(sys.argv)  # by a process that knows no jax

from absl import flags

from advgame_jax import cluster, command, profile, train

CONFIG = command.define_config("configs/microworld.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; of several hosts, a shared one.", required=True)
ALLOW_CHANGES = flags.DEFINE_bool("allow_changes", False, "Continue the run in --workdir with other settings or seeds.")
PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps to profile into the run's folder (docs/profile.md).")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; the port below must be free as well.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many there are; 1 looks for no cluster.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.", lower_bound=0)
LOCAL_DEVICES = flags.DEFINE_string("local_devices", "", "Numbers of the host's devices for this process; empty: all.")
HEARTBEAT = flags.DEFINE_integer("heartbeat_seconds", 30, "A host silent for so long is gone.", lower_bound=1)
JOIN = flags.DEFINE_integer("join_seconds", 300, "In which all processes must have come.", lower_bound=1)
RESTARTS = flags.DEFINE_integer("max_restarts", 0, "Start again so often if killed or failed.", lower_bound=0)


def main() -> None:
  place = cluster.find(COORDINATOR.value, PROCESSES.value, PROCESS.value, LOCAL_DEVICES.value)
  with cluster.joined(place, HEARTBEAT.value, JOIN.value):
    config = CONFIG()
    window = profile.parse_window(PROFILE.value, config.steps) if PROFILE.value is not None else None
    train.train(config, WORKDIR.value, ALLOW_CHANGES.value, profiled=window)


if __name__ == "__main__":
  command.run(main)
