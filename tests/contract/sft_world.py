"""The smallest fine-tuning run: recorded files of random episodes, and an engine that notes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_vla.config.sft import SFTRecipe, load_sft_recipe
from verl_vla.datasets.libero_reader import demo_file
from verl_vla.datasets.libero_writer import LiberoEpisode, write_libero_file
from verl_vla.datasets.sft_dataset import SampleBatch
from verl_vla.envs.registry import suite
from verl_vla.policies.base import Processor

TASKS = (0, 4)
SIZE = 112
"""Size of the embedded policy's images, pixels."""
NUM_STEPS, EVERY, CHUNK = 26, 3, 8
SAMPLES_AN_EPISODE = len(range(0, NUM_STEPS - CHUNK + 1, EVERY))


def write_demos(
    folder: Path, *, episodes: int = 2, scale: float = 0.5, tasks: Sequence[int] = TASKS
) -> Path:
    """Write files of episodes with an image at every third step, grey as episode and step say."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        given = (_episode(task, number, scale) for number in range(episodes))
        write_libero_file(demo_file(folder, suite("mini").task(task).name), given, {})
    return folder


def _episode(task: int, number: int, scale: float) -> LiberoEpisode:
    rng = np.random.default_rng([task, number])
    states = rng.normal(size=(NUM_STEPS, 12))
    rendered = np.arange(NUM_STEPS) % EVERY == 0
    grey = 20 * TASKS.index(task) + 10 * number + np.flatnonzero(rendered) // EVERY
    images = np.broadcast_to(grey[:, None, None, None], (len(grey), SIZE, SIZE, 3))
    return LiberoEpisode(
        task_id=task,
        attributes={"problem_info": json.dumps({"language_instruction": "do it"})},
        model_file="<mujoco/>",
        actions=rng.uniform(-scale, scale, (NUM_STEPS, 7)),
        states=states,
        disturbed=np.zeros(NUM_STEPS, dtype=bool),
        robot_states=rng.normal(size=(NUM_STEPS, 9)),
        proprio={"obs/joint_states": states[:, 1:8]},
        rendered=rendered,
        images={"obs/agentview_rgb": images.astype(np.uint8)},
    )


def grey_of(images: Tensor) -> list[int]:
    """[n], the level that each sample's image was written with."""
    return images.float().mean((1, 2, 3, 4)).round().long().tolist()


def sft_recipe(folder: Path, demos: Path, *words: str) -> SFTRecipe:
    """Six steps; saved at 1, 4 and 6, tested at 3 and 6, played at 5 and 6."""
    return load_sft_recipe(
        [
            "recipe=sft_mini",
            f"out='{folder}'",
            f"demos.folder='{demos}'",
            "demos.images=stored",
            "demos.num_loaders=0",
            "demos.augment=false",
            f"environment.tasks={list(TASKS)}",
            f"environment.render_size={SIZE}",
            "policy.path=bases/mini",
            "optimizer.batch_size=4",
            "optimizer.micro_batch_size=2",
            "trainer.total_training_steps=6",
            "trainer.save_every=4",
            "trainer.test_every=3",
            "trainer.eval_every=5",
            "trainer.show_every=99",
            "evaluation.episodes_per_task=2",
            *words,
        ]
    )


class NotingEngine:
    """One rank that learns nothing: it counts its steps and keeps what it was given."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.num_steps = 0
        self.learned: list[list[int]] = []
        """Grey levels of every step's samples."""
        self.tested: list[list[tuple[int, float]]] = []
        """Grey levels and weights of every test, over its batches."""
        self.num_tested: list[tuple[list[int], int]] = []
        """Sizes of every test's batches, and the number of samples of all ranks."""
        self.asked: list[tuple[list[int], float]] = []
        """Grey levels of every question of a rollout, and its temperature."""

    def train_step(self, batch: SampleBatch) -> dict[str, float]:
        self.num_steps += 1
        self.learned.append(grey_of(batch.images))
        return {
            "train/loss": 1.0 / self.num_steps,
            "train/accuracy": 0.5,
            "train/grad_norm": 1.0,
            "train/skipped_steps": 0.0,
            "train/lr": 1e-3,
        }

    def test(self, batches: Any, num_samples: int) -> list[float]:
        sizes, found = [], []
        for batch, weights in batches:
            sizes.append(len(weights))
            found += zip(grey_of(batch.images), weights.tolist(), strict=True)
        self.tested.append(found)
        self.num_tested.append((sizes, num_samples))
        return [2.0, 0.25]

    def sample_actions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Tensor,
        noise: Tensor,
        temperature: float,
        proprio: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Bins that repeat the noise, so that each answer shows whose it is."""
        self.asked.append((grey_of(images), temperature))
        assert len(input_ids) == len(attention_mask) == len(images) == len(noise) == len(proprio)
        return (noise * 100).long(), -noise.float()

    def save_checkpoint(self, local_path: str, *, global_step: int) -> None:
        rank = torch.distributed.get_rank()
        folder = Path(local_path)
        folder.mkdir(exist_ok=True)
        (folder / f"rank_{rank}").write_text(f"{self.num_steps} {global_step}")
        torch.distributed.barrier()  # as the engine does

    def load_checkpoint(self, local_path: str, *, del_local_after_load: bool) -> None:
        assert not del_local_after_load
        rank = torch.distributed.get_rank()
        self.num_steps, step = map(int, (Path(local_path) / f"rank_{rank}").read_text().split())
        assert self.num_steps == step

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.distributed.barrier()  # as the engine does


def levels(episodes: Sequence[int]) -> Iterator[int]:
    """Grey levels of the samples of these episodes of both tasks."""
    for task in range(len(TASKS)):
        for number in episodes:
            for sample in range(SAMPLES_AN_EPISODE):
                yield 20 * task + 10 * number + sample
