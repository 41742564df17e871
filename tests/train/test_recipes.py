"""The recipes for several hosts: the ssh script with a shell in place of ssh, and tasks as SLURM starts them."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, figures, small, wait_all, write_config, write_data

from train.config import TrainConfig

SCRIPT = ROOT / "examples" / "train_over_ssh.sh"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Pictures only."""
    return write_data(tmp_path_factory.mktemp("data"), pictures=16, clips=0, texts=0)


@pytest.fixture
def shell(tmp_path):
    """What stands for ssh: takes a host and a command line."""
    file = tmp_path / "shell"
    file.write_text('#!/bin/sh\necho "$1" >> "$0.hosts"\nexec sh -c "$2"\n')
    file.chmod(0o755)
    return file


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}


def over_ssh(config: TrainConfig | Path, shell: Path, **more: str) -> subprocess.CompletedProcess:
    file = write_config(config) if isinstance(config, TrainConfig) else config
    env = environment(4) | {"HOSTS": "localhost localhost", "SSH": str(shell), "PORT": str(free_port()), "PAUSE": "0"}
    env |= {"PYTHON": shlex.quote(sys.executable)} | more
    return subprocess.run([SCRIPT, file], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_over_ssh(records, tmp_path, shell):
    config = small(tmp_path / "run", records, compute={"mesh": "fsdp=8"}, held_out={"answers": 0})
    done = over_ssh(config, shell)
    assert done.returncode == 0, done.stderr
    assert sorted(figures(config.folder)) == [1, 2]
    assert Path(f"{shell}.hosts").read_text() == "localhost\n" * 2


def test_bad_input_is_not_tried_again(tmp_path, shell):
    done = over_ssh(tmp_path / "missing.py", shell)
    assert done.returncode == 2 and "there is no configuration" in done.stderr
    assert Path(f"{shell}.hosts").read_text() == "localhost\n" * 2


def test_a_failure_is_tried_again(tmp_path, shell):
    """A program that fails the first time, in place of training."""
    failing = tmp_path / "python"
    failing.write_text(
        f'#!/bin/sh\n[ -e "{tmp_path}/tried.$LMM_PROCESS" ] && exit 0\ntouch "{tmp_path}/tried.$LMM_PROCESS"\nexit 134\n'
    )
    failing.chmod(0o755)
    done = over_ssh(tmp_path / "config.py", shell, PYTHON=str(failing))
    assert done.returncode == 0 and "attempt 1, after exit status 134" in done.stdout
    failing.write_text("#!/bin/sh\nexit 134\n")
    done = over_ssh(tmp_path / "config.py", shell, PYTHON=str(failing), RESTARTS="2")
    assert done.returncode == 134 and "attempt 2" in done.stdout and "attempt 3" not in done.stdout


def test_what_is_no_failure_is_not_tried_again(tmp_path, shell):
    """One process was asked to stop, the other lost it."""
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\nexit $((134 + 9 * LMM_PROCESS))\n")
    failing.chmod(0o755)
    done = over_ssh(tmp_path / "config.py", shell, PYTHON=str(failing))
    assert done.returncode == 143 and "attempt" not in done.stdout


@pytest.mark.parametrize("status", [0, 143, 1])
def test_the_batch_script(tmp_path, status):
    """With programs in place of SLURM's that write down what they are asked."""
    for name, ends in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" "$LMM_COORDINATOR" >> "{tmp_path}/asked"\nexit {ends}\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    done = subprocess.run(["bash", ROOT / "examples" / "train.sbatch", "a.py", "--max-steps", "3"], env=env)
    assert done.returncode == status
    started, *more = (tmp_path / "asked").read_text().splitlines()
    assert started == "srun --kill-on-bad-exit=1 --cpus-per-task=12 python -m train a.py --max-steps 3 auto"
    assert more == (["scontrol requeue 7 auto"] if status == 143 else [])


@pytest.mark.slow
def test_as_slurm_starts_tasks(records, tmp_path):
    config = small(tmp_path / "run", records, compute={"mesh": "fsdp=8"}, held_out={"answers": 0})
    job = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "LMM_COORDINATOR": "auto",
    }
    processes = []
    for i in range(2):
        env = environment(4) | job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        with Path(f"{config.folder}.{i}.log").open("w") as out:
            command = [sys.executable, "-m", "train", str(write_config(config))]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT))
    statuses, said = wait_all(config, processes)
    assert statuses == [0, 0], said
    assert sorted(figures(config.folder)) == [1, 2]
