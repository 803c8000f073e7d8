"""The whole table as a job array of Slurm, on a cluster of one node that the test starts where Slurm is installed."""

import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from helpers import records_in

import additional_experiments as ae

ROOT = Path(ae.__file__).parent
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])  # not everybody's PATH has the daemons
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0  # slurmd starts jobs as whoever has submitted them
HAS_SLURM = all(shutil.which(name, path=PATH) for name in ("munged", "slurmctld", "slurmd", "sbatch"))

# Two CPUs, of which each task gets one; no accounting, no cgroups.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
NodeName={node} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster whose files are all in `folder`, and which is gone, with its jobs, after `with`."""

    def __init__(self, folder):
        self.folder = folder
        # The test itself may run as a job: what such a job inherits must not reach these commands.
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        }
        self.environment |= dict(PATH=PATH, SLURM_CONF=f"{folder}/slurm.conf", PYTHON=sys.executable)
        self.daemons = []

    def __enter__(self):
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        node = platform.node().partition(".")[0]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=self.folder, node=node, ports=free_ports(2))
        )
        try:
            files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            files = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
            self.start("munged", "--foreground", "--force", *files)
            wait_until((self.folder / "munge.socket").exists, self)
            self.start("slurmctld", "-D", "-c")
            self.start("slurmd", "-D")
            wait_until(lambda: self.command("sinfo", "--noheader", "--format=%T", check=False) == "idle", self)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self, name, *arguments):
        """Start a daemon that stays a child of this process."""
        with open(self.folder / f"{name}.out", "w") as out:
            command = [shutil.which(name, path=PATH), *arguments]
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            )

    def command(self, *command, check=True):
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def states(self):
        """{"JOB_TASK": state} of all tasks."""
        lines = self.command("squeue", "--noheader", "--array", "--states=all", "--format=%F_%K %T").splitlines()
        return dict(line.split() for line in lines)

    def written(self):
        """The ends of what the daemons and the tasks have written."""
        files = [*self.folder.glob("*.out"), *self.folder.glob("*.log"), *Path().glob("slurm-*.out")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in files)

    def processes(self):
        """The ids of the daemons, of what they have started, and of the jobs."""
        found, mark = [daemon.pid for daemon in self.daemons if daemon.poll() is None], os.fsencode(self.folder)
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended
                if b"SLURM_CONF=" + mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def __exit__(self, *_):
        while found := self.processes():
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)


def free_ports(number):
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(condition, slurm, seconds=60):
    """Returns when `condition()` is true; fails if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, slurm.written()
        time.sleep(0.05)


@pytest.fixture
def slurm():
    # Sockets may have paths of a hundred letters: the folders of pytest are too deep.
    with tempfile.TemporaryDirectory() as folder, Slurm(Path(folder)) as cluster:
        yield cluster


@contextmanager
def one_thread():
    """PyTorch as in a task with one CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(path, capfd):
    """The lines that --report prints, without times and in any order: that of the runs in the file differs."""
    capfd.readouterr()
    assert ae.main(["--report", path]) == 0
    return sorted(re.sub(r"\d+\.\d+ min", "", capfd.readouterr().out).splitlines())


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SLURM, reason="Slurm and munge are not installed")
@pytest.mark.skipif(not IS_ROOT, reason="only root can start slurmd")
def test_job_array(slurm, nano, capfd):
    """Three tasks at the ends of the numbers of rows and seeds; one is ended by SIGTERM and requeued."""
    Path("additional_experiments.py").symlink_to(ae.__file__)
    # So many epochs that the signal comes before the last one, however late it comes.
    further, longer = [*nano, "--results_file", "shared.csv", "--checkpoint_minutes", "0"], ["--num_epochs", "150"]

    def submit(tasks, *options):
        script = str(ROOT / "runner" / "slurm_array.sh")
        return slurm.command("sbatch", "--parsable", f"--array={tasks}", script, *further, *options)

    def log(task):
        return Path(f"slurm-{task}.out").read_text()

    task = f"{submit(20, *longer)}_20"
    others = submit("2,19")
    checkpoint = Path("row1-seed124.ckpt")
    wait_until(checkpoint.exists, slurm)
    slurm.command("scancel", "--batch", "--signal=TERM", task)
    wait_until(lambda: slurm.states()[task] not in ("RUNNING", "COMPLETING"), slurm)
    assert slurm.states()[task] == "FAILED" and checkpoint.exists()
    assert log(task).endswith("\ninterrupted; the same command resumes from row1-seed124.ckpt\n")

    # A requeued task waits for two minutes, unless it is told otherwise; slurmd refuses it within the second in which
    # it has ended.
    slurm.command("scontrol", "requeue", task)
    slurm.command("scontrol", "update", f"JobId={task}", "StartTime=now+2")
    wait_until(lambda: not {"PENDING", "RUNNING", "COMPLETING"} & {*slurm.states().values()}, slurm)
    assert slurm.states() == dict.fromkeys([task, f"{others}_2", f"{others}_19"], "COMPLETED"), slurm.written()
    before, resumed, _ = log(task).partition("Resuming from row1-seed124.ckpt after ")
    assert "interrupted; " in before and resumed  # nothing of the first part is lost

    with one_thread():
        for row, seed, options in ((1, 124, longer), (2, 123, []), (19, 123, [])):
            options = [*nano, *options, "--feature_cache", "", "--results_file", "alone.csv"]
            assert ae.main(["--row", str(row), "--seed", str(seed), *options]) == 0
    by_slurm, alone = records_in("shared.csv"), records_in("alone.csv")
    assert len(by_slurm) == 3 and {*map(str, by_slurm)} == {*map(str, alone)}
    assert report("shared.csv", capfd) == report("alone.csv", capfd)
