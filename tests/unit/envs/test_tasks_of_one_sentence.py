"""LIBERO-90 says the same sentence for several tasks; rewards must tell these apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from verl_vla.core.episode import Outcome
from verl_vla.core.tables import Episodes, PolicySteps, Trajectories
from verl_vla.envs.registry import suite
from verl_vla.rewards.reference_memory import ReferenceMemory
from verl_vla.rewards.scoring import make_batch


def test_the_sentences_of_libero_90_are_fewer_than_its_tasks() -> None:
    uses = Counter(task.instruction for task in suite("libero_90").tasks)
    shared = [number for number in uses.values() if number > 1]
    assert (len(shared), sum(shared)) == (12, 28)


def trajectories(tasks: list[int]) -> Trajectories:
    """One solved episode of each task."""
    number = len(tasks)
    return Trajectories(
        episodes=Episodes(
            task_id=torch.tensor(tasks),
            init_state_id=torch.zeros(number, dtype=torch.int64),
            group_id=torch.arange(number),
            episode_id=torch.arange(number),
            outcome=torch.full((number,), Outcome.SUCCESS),
            num_steps=torch.full((number,), 4),
        ),
        policy_steps=PolicySteps(
            episode=torch.arange(number),
            image=torch.zeros(number, 1, 2, 2, 3, dtype=torch.uint8),
            proprio=torch.zeros(number, 8),
            action_tokens=torch.zeros(number, 2, dtype=torch.int64),
            log_probs=torch.zeros(number, 2),
            executed=torch.full((number,), 4),
        ),
        prompt_ids=(torch.tensor([1]),) * number,
        goals=(np.zeros((2, 1, 3), dtype=np.float32),) * number,
    )


def test_references_of_one_task_are_not_those_of_another_with_its_sentence() -> None:
    tasks = suite("libero_90").tasks
    uses = Counter(task.instruction for task in tasks)
    sentence = next(words for words, number in uses.items() if number == max(uses.values()))
    ids = [i for i, task in enumerate(tasks) if task.instruction == sentence]
    batch = make_batch(trajectories(ids), suite="libero_90", split="train", mirrored=True)
    features = tuple(np.full((2, 3), float(i), dtype=np.float32) for i in ids)
    batch = replace(batch, features=features, feature_space="test")
    memory = ReferenceMemory(capacity=4, max_age=4)
    memory.add(batch)
    assert memory.tasks == tuple(sorted(f"libero_90/{i}" for i in ids))
    for i in ids:
        chosen = memory.select(batch, f"libero_90/{i}", 0).items
        assert [reference.features[0, 0] for reference in chosen] == [float(i)]
