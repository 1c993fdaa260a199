"""Modal: rents a GPU and runs one command of this project on it. It decides nothing itself.

    pip install modal
    modal run scripts/cloud/modal_train.py --gpu A10G --words "profile=qlora_24gb suite=spatial"
    modal run scripts/cloud/modal_train.py --gpu A100-80GB:8 --words "profile=8gpu suite=spatial"

Policies are read from, and runs are kept on, the volume ``verl-vla``, as ``models`` and ``runs``.
"""

from __future__ import annotations

import subprocess

import modal

PROJECT = "/opt/verl_vla"
GL_PACKAGES = ("libegl1", "libopengl0", "libgl1-mesa-dri", "libosmesa6")
"""As in scripts/_setup.sh."""
DAY_S = 24 * 60 * 60

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


@app.function(image=image, volumes={"/data": volume}, timeout=DAY_S)
def train(words: list[str]) -> None:
    """Train on the GPUs of this container."""
    command = ["python", "-m", "verl_vla", "train", "recipe=libero", *words]
    subprocess.run(command, cwd="/data", check=True)


@app.local_entrypoint()
def main(gpu: str = "A10G", words: str = "profile=qlora_24gb") -> None:
    """Hand the words over; ``gpu`` is Modal's name, with a number behind a colon."""
    train.with_options(gpu=gpu).remote(words.split())
