"""Trajectories of a world in which images show true progress, for the reward benchmark."""

from __future__ import annotations

import numpy as np
import torch

from verl_vla.core.episode import Outcome
from verl_vla.core.tables import Episodes, PolicySteps, Trajectories

NUM_GROUPS, SIZE, TASKS = 16, 6, 2
PIXELS = 16
CHUNK = 8


def image(progress: float, task: int, layout: int) -> np.ndarray:
    """[1, H, W, 3]: a bar that grows from the left, on a ground that tells the layout."""
    image = np.full((PIXELS, PIXELS), 20 + 4 * (layout % 8), dtype=np.float64)
    reach = progress * (PIXELS - 4)
    edge = np.clip(reach - np.arange(PIXELS), 0, 1)
    rows = slice(2, 6) if task == 0 else slice(9, 13)
    image[rows] += 180 * edge
    return np.repeat(image.astype(np.uint8)[None, :, :, None], 3, axis=3)


def episode(reached: float, num: int, task: int, layout: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [num + 1, 1, H, W, 3] before each policy step and at the end; readings as many."""
    progress = reached * np.linspace(0, 1, num + 1)
    frames = np.stack([image(p, task, layout) for p in progress])
    left = 1 - progress
    goals = np.stack([left, left, progress >= 1], axis=1)[:, None].astype(np.float32)
    return frames, goals


def make_trajectories(seed: int = 0, *, crash_last: bool = False) -> Trajectories:
    """Groups of successes and of failures that come anywhere; those all last equally long."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list] = {name: [] for name in ("image", "episode", "executed")}
    table: dict[str, list[int]] = {
        name: []
        for name in ("task_id", "init_state_id", "group_id", "episode_id", "outcome", "num_steps")
    }
    goals, final_images = [], []
    for index in range(NUM_GROUPS * SIZE):
        group = index // SIZE
        task = group % TASKS
        solved = rng.random() < 0.4
        num = int(rng.integers(5, 8)) if solved else 8
        frames, readings = episode(1.0 if solved else rng.random(), num, task, group)
        last = 3 if solved else CHUNK
        goals.append(readings)
        rows["image"].append(frames[:-1])
        rows["episode"] += [index] * num
        rows["executed"] += [CHUNK] * (num - 1) + [last]
        lost = crash_last and index == NUM_GROUPS * SIZE - 1
        final_images.append(None if lost else frames[-1])
        outcome = Outcome.SUCCESS if solved else Outcome.TIMEOUT
        values = (group % TASKS, group // TASKS, group, index)
        for name, value in zip(table, values, strict=False):
            table[name].append(value)
        table["outcome"].append(int(Outcome.CRASH if lost else outcome))
        table["num_steps"].append(CHUNK * (num - 1) + last)
    num_rows = len(rows["episode"])
    return Trajectories(
        episodes=Episodes(**{name: torch.tensor(column) for name, column in table.items()}),
        policy_steps=PolicySteps(
            episode=torch.tensor(rows["episode"]),
            image=torch.from_numpy(np.concatenate(rows["image"])),
            proprio=torch.from_numpy(rng.normal(size=(num_rows, 8)).astype(np.float32)),
            action_tokens=torch.zeros((num_rows, 4), dtype=torch.int64),
            log_probs=torch.zeros((num_rows, 4)),
            executed=torch.tensor(rows["executed"]),
        ),
        prompt_ids=tuple(torch.arange(1 + row % 3) for row in range(num_rows)),
        goals=tuple(goals),
        final_images=tuple(final_images),
        crashes={NUM_GROUPS * SIZE - 1: "killed"} if crash_last else {},
    )
