"""The script of the job array, called as Slurm calls it for one task."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import records_in

import additional_experiments as ae

SCRIPT = Path(ae.__file__).parent / "runner" / "slurm_array.sh"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no Slurm on Windows")
def test_a_task_is_preempted_and_requeued(nano):
    """Task 38 is row 19 with the second seed. Slurm sends SIGTERM to the shell, whose place Python has taken."""
    Path("additional_experiments.py").symlink_to(ae.__file__)
    task = dict(SLURM_ARRAY_TASK_ID="38", SLURM_CPUS_ON_NODE="1", PYTHON=sys.executable)
    options = [*nano, "--num_epochs", "10"]

    def start():
        command = ["bash", str(SCRIPT), *options]
        return subprocess.Popen(command, env=os.environ | task, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    process = start()
    while not Path("row19-seed124.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0].decode()
    assert process.returncode == 143 and out.endswith("interrupted; the same command resumes from row19-seed124.ckpt\n")
    process = start()
    out = process.communicate()[0].decode()
    assert process.returncode == 0 and "Resuming from row19-seed124.ckpt after" in out and ", 1 thread" in out
    [record] = records_in()
    assert record["settings"] == vars(ae.parse_args([*options, "--row", "19", "--seed", "124"])[0])
    assert not Path("row19-seed124.ckpt").exists()  # the record is enough: the task is not run again
    process = start()
    out = process.communicate()[0].decode()
    assert process.returncode == 0 and "Finished before: results/" in out and not Path("row19-seed124.ckpt").exists()
