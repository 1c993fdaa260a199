"""A real SIGTERM through the launchers of several nodes: the step is saved before Ray ends.

Stubs stand in for Slurm, Ray and the training command; the scripts and the handler are real.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 20.0
"""Time for a line to be logged, or for a script to end, on a busy machine."""

TRAIN = f"""#!{sys.executable}
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from verl_vla.core.signals import stop_requests
log = open(os.environ["LOG"], "a", buffering=1)
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
print(os.environ["RAY_AUTH_MODE"], token, file=open(os.environ["LOG"] + ".tokens", "a"))
with stop_requests() as stop:
    log.write("train " + " ".join(sys.argv[4:]) + "\\n")
    for _ in range(100):
        time.sleep(0.1)
        if stop.is_made:
            time.sleep(0.5)  # the rest of the step, in which a second signal would end it
            log.write(f"saved after signal {{stop.signal_number}}\\n")
            sys.exit(128 + stop.signal_number)
"""
RAY = """#!/usr/bin/env bash
echo "ray $*" >>"$LOG"
echo "$RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH")" >>"$LOG.tokens"
if [[ $* != *--block* ]]; then exit; fi
trap 'echo "node lost" >>"$LOG"; exit 143' TERM
for _ in {1..100}; do sleep 0.1; done
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
echo "srun $2 with ${SRUN_CPUS_PER_TASK:-no} cores" >>"$LOG"
"$@" &
task=$!
trap 'kill -TERM "$task"' TERM
while kill -0 "$task" 2>/dev/null; do wait "$task" && code=0 || code=$?; done
exit "$code"
"""
SLURM = {
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "64",
}


class Checkout:
    """A folder with the real launchers, in which nothing is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        with (folder / "scripts" / "_setup.sh").open("a") as setup:
            setup.write("\nset_up_packages() { :; }\nset_up_renderer() { :; }\n")
        for name, text in (
            (".venv/bin/python", TRAIN),
            (".venv/bin/ray", RAY),
            ("bin/srun", SRUN),
            ("bin/scontrol", "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n"),
        ):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a script in a process group of its own, and wait until it trains."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, **SLURM, "PATH": path, "LOG": str(self.folder / "log")}
        process = subprocess.Popen(
            ["bash", *command],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # a shell cannot trap what was ignored when it began, as SIGINT is after ``nohup cmd &``
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self._started.append(process)
        self.await_line("train ")
        return process

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def await_line(self, start: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not any(line.startswith(start) for line in self.log()):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def end(self) -> None:
        """End what is left, as Slurm does when the batch script has ended."""
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def checkout(tmp_path: Path) -> Generator[Checkout]:
    made = Checkout(tmp_path)
    yield made
    made.end()


HEAD = ("scripts/train_multinode.sh", "head", "2", "suite=spatial")
BATCH = ("scripts/slurm.sbatch", "suite=spatial")


def test_a_signal_lets_the_step_be_saved_before_ray_ends(checkout: Checkout) -> None:
    script = checkout.start(*HEAD)
    script.terminate()
    assert script.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert checkout.log()[-2:] == [f"saved after signal {int(signal.SIGTERM)}", "ray stop"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_reaches_training_once(
    checkout: Checkout, number: signal.Signals
) -> None:
    """Ctrl-C in a terminal, and schedulers that signal a process group."""
    script = checkout.start(*HEAD)
    os.killpg(script.pid, number)
    assert script.wait(PATIENCE_S) == 128 + number
    assert checkout.log()[-2:] == [f"saved after signal {int(number)}", "ray stop"]


def test_without_a_signal_the_exit_code_is_that_of_training(checkout: Checkout) -> None:
    python = checkout.folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "train $*" >>"$LOG"; exit 6\n')
    script = checkout.start(*HEAD)
    assert script.wait(PATIENCE_S) == 6
    assert checkout.log()[-1] == "ray stop"


def test_a_job_saves_its_step_while_the_other_nodes_serve(checkout: Checkout) -> None:
    script = checkout.start(*BATCH)
    checkout.await_line("ray start --address node1:20007")
    script.terminate()
    assert script.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert checkout.log()[-2:] == [f"saved after signal {int(signal.SIGTERM)}", "ray stop"]
    assert "node lost" not in checkout.log()


def test_every_task_has_the_cores_that_the_job_asked_for(checkout: Checkout) -> None:
    """Since Slurm 22.05, srun takes --cpus-per-task from its own variable only."""
    checkout.start(*BATCH)
    checkout.await_line("srun join")
    tasks = {line for line in checkout.log() if line.startswith("srun ")}
    assert tasks == {"srun head with 64 cores", "srun join with 64 cores"}
    (train,) = (line for line in checkout.log() if line.startswith("train "))
    assert train == (
        "train recipe=libero profile=8gpu cluster.num_nodes=2 "
        "cluster.address=127.0.0.1:20007 suite=spatial"
    )


def test_training_and_all_nodes_have_one_token_that_nobody_else_can_read(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `ray start` asks for the one in the user's home, if there is one, and training not."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    checkout.start(*BATCH)
    checkout.await_line("ray start --address node1:20007")
    file = checkout.folder / ".venv" / "ray_token"
    told = (checkout.folder / "log.tokens").read_text().splitlines()
    assert told == [f"token {file.read_text()}"] * 3
    assert re.fullmatch("[0-9a-f]{64}", file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_node_that_only_simulates_gives_ray_no_slot(checkout: Checkout) -> None:
    checkout.start(*HEAD)
    script = "scripts/train_multinode.sh"
    checkout.start(script, "simulate", "node1")
    checkout.await_line("ray start --address node1")
    assert checkout.log()[-1] == (
        'ray start --address node1:6379 --block --num-cpus=0 --resources {"env_node": 1}'
    )


def test_slurm_signals_the_batch_script_alone_and_early_enough() -> None:
    """The script hands it on; the other nodes' Ray must not get it.

    By the plan of profile 8gpu a step takes 13 minutes.
    """
    text = (ROOT / "scripts" / "slurm.sbatch").read_text()
    asked = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, flags=re.MULTILINE)
    assert asked is not None
    assert int(asked[1]) >= 3 * 13 * 60
