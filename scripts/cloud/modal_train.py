"""Modal: rents a GPU and runs one command of this project on it. It decides nothing itself.

    pip install modal
    modal run --detach scripts/cloud/modal_train.py --words "profile=qlora_24gb suite=spatial"
    modal run --detach scripts/cloud/modal_train.py --gpu A100-80GB:8 --words "profile=8gpu"

Policies are read from, and runs are kept on, the volume ``verl-vla``, as ``models`` and ``runs``.
Processors and memory are those that ``verl-vla plan`` counts. Modal ends a function after a day:
before that the run is told to stop, saves its step, and goes on in a new container.
"""

from __future__ import annotations

import json
import subprocess
import sys

import modal

PROJECT = "/opt/verl_vla"
GL_PACKAGES = ("libegl1", "libopengl0", "libgl1-mesa-dri", "libosmesa6")
"""As in scripts/_setup.sh."""
DAY_S = 24 * 60 * 60
"""Modal's longest timeout of one attempt."""
STOP_S = 3 * 60 * 60
"""Time to end a training step, evaluate and save: three steps of the slowest profile."""
OVERDUE = 124
"""Exit code of ``timeout`` after it has told a command to stop."""
ATTEMPTS = 10
"""Most that Modal allows: ten days."""
THREADS_PER_CORE = 2
"""Modal counts physical cores, the plan counts what ``nproc`` does."""
MIB = 2**20

app = modal.App("verl-vla")
volume = modal.Volume.from_name("verl-vla", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install(*GL_PACKAGES)
    .add_local_dir(".", PROJECT, copy=True, ignore=[".git", ".venv", "runs", "models"])
    .run_commands(
        f"pip install uv && uv pip install --system --no-deps -r {PROJECT}/requirements/run.lock",
        f"uv pip install --system --no-deps --editable {PROJECT}",
    )
)


@app.function(image=image, volumes={"/data": volume}, cpu=2.0, memory=8192)
def plan(words: list[str]) -> dict[str, int]:
    """Count what the host needs; the GPU is named because ``plan`` asks for one."""
    command = ["python", "-m", "verl_vla", "plan", "recipe=libero", *words, "--gpu", "h200"]
    # not checked: a recipe that does not fit the GPU has a host all the same
    counted = subprocess.run([*command, "--json"], cwd="/data", stdout=subprocess.PIPE, check=False)
    return json.loads(counted.stdout)


@app.function(
    image=image,
    volumes={"/data": volume},
    timeout=DAY_S,
    retries=modal.Retries(max_retries=ATTEMPTS, backoff_coefficient=1.0, initial_delay=1.0),
)
def train(words: list[str]) -> int:
    """Train on the GPUs of this container; return the command's exit code."""
    stop = ["timeout", "--signal=TERM", f"--kill-after={STOP_S - 60}", str(DAY_S - STOP_S)]
    command = ["python", "-m", "verl_vla", "train", "recipe=libero", *words]
    code = subprocess.run([*stop, *command], cwd="/data", check=False).returncode
    # the one failure that is tried again: a recipe that is refused stays refused
    assert code != OVERDUE, "a day is over; the same command goes on in a new container"
    return code


@app.local_entrypoint()
def main(gpu: str = "A10G", words: str = "profile=qlora_24gb") -> None:
    """Hand the words over; ``gpu`` is Modal's name, with a number behind a colon."""
    given = words.split()
    host = plan.remote(given)
    cores, memory = host["host_cores"] / THREADS_PER_CORE, host["host_bytes"] // MIB
    sys.exit(train.with_options(gpu=gpu, cpu=cores, memory=memory).remote(given))
