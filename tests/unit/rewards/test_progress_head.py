"""The causal head: that it is trained at all, that it is causal, and what it is trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_world import SIZE, episode, make_batch

from verl_vla.rewards import HeadConfig, ProgressHead, load_reward
from verl_vla.rewards.progress_head import make_example

SMALL = HeadConfig(width=16, steps=60, batch_size=8)


def successes(num: int = 8, tasks: int = 2) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return {f"mini/{t}": [episode(1, rng=rng, task=t) for _ in range(num)] for t in range(tasks)}


def test_the_gradient_reaches_every_weight():
    """The published head was cut off from its loss and never moved."""
    head = ProgressHead(SIZE, SMALL, seed=0)
    rng = np.random.default_rng(0)
    head.loss([make_example(successes(), rng) for _ in range(8)]).backward()
    for name, weight in head.network.named_parameters():
        assert weight.grad is not None and float(weight.grad.abs().max()) > 0, name


def test_update_moves_the_weights_that_score():
    reward = load_reward("siglip_t", {"encoder": "pixels", "head_steps": 3}, seed=1)
    batch = make_batch([1, 1, 0.4, 0.8])
    untrained = reward(batch)
    metrics = reward.update(batch)
    first = {k: v.clone() for k, v in reward.state_dict()["head"]["average"].items()}
    reward.update(batch)
    second = reward.state_dict()["head"]["average"]
    assert metrics["head_loss"] > 0
    assert untrained.progress[2] == untrained.progress[3] == 0.5
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_one_success_in_four_never_trains_the_head_and_gives_its_noise():
    first = make_batch([1] * 8)
    features = list(first.features or ())
    for row in (0, 4):
        features[row] = features[row][::-1] * 3
    heads = []
    for batch in (first, make_batch([1] * 8, features=tuple(features))):
        reward = load_reward("siglip_t", {"encoder": "pixels", "head_steps": 3}, seed=1)
        reward.update(batch)
        heads.append(reward.state_dict()["head"]["network"])
        items = reward._memory.of_task("mini/0")
        assert [items[i].episode_id for i in reward.unseen(items)] == [0, 4]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_training_lowers_the_loss_and_ranks_failures_it_never_saw():
    head = ProgressHead(SIZE, SMALL, seed=0)
    losses = [head.train(successes())["head_loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    rng = np.random.default_rng(4)
    reached = np.linspace(0.05, 0.95, 10)
    found = [head.progress(episode(float(r), rng=rng, num_rows=20))[-3:].mean() for r in reached]
    ranks = np.argsort(np.argsort(found))
    assert np.corrcoef(ranks, np.arange(10))[0, 1] > 0.8


def test_what_comes_later_does_not_change_what_was_thought_before():
    head = ProgressHead(SIZE, SMALL, seed=0)
    head.train(successes())
    whole = episode(1, rng=np.random.default_rng(2), num_rows=14)
    np.testing.assert_allclose(head.progress(whole[:6]), head.progress(whole)[:6], atol=1e-6)
    mixed = whole[[0, *range(13, 0, -1)]]
    assert np.abs(head.progress(mixed)[-1] - head.progress(whole)[-1]) > 0.05


def test_it_is_the_same_twice_and_leaves_the_processes_random_state_alone():
    state = torch.random.get_rng_state()
    first, second = (ProgressHead(SIZE, SMALL, seed=3) for _ in range(2))
    assert first.train(successes()) == second.train(successes())
    assert torch.equal(state, torch.random.get_rng_state())
    assert ProgressHead(SIZE, SMALL, seed=4).train(successes()) != first.train(successes())


def test_examples_are_rewound_stalled_and_spliced():
    rng = np.random.default_rng(0)
    known = successes()
    labels = [make_example(known, rng)[1] for _ in range(400)]
    falls = [bool((np.diff(y) < 0).any()) for y in labels]
    zeros = [bool((y[-2:] == 0).all()) and bool(y.any()) for y in labels]
    stalls = [len(y) > 1 and y[-1] == y[-2] and y[-1] > 0 for y in labels]
    assert 0.3 < np.mean(falls) < 0.55
    assert 0.04 < np.mean(zeros) < 0.2
    assert 0.1 < np.mean(stalls) < 0.35
    assert all(len(f) == len(y) for f, y in (make_example(known, rng) for _ in range(50)))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_the_shortest_success_is_an_example(num_rows):
    rng = np.random.default_rng(0)
    short = {"mini/0": [episode(1, rng=rng, num_rows=8)[:num_rows]]}
    for _ in range(40):
        features, labels = make_example(short, rng)
        assert len(features) == len(labels) >= 1 and np.isfinite(labels).all()
    ProgressHead(SIZE, SMALL, seed=0).train(short)


def test_the_published_time_embedding_cannot_tell_an_order_of_frames():
    """Added before a mean, it is a constant."""
    arguments = {"encoder": "pixels", "temporal": "additive", "pooling": "mean"}
    reward = load_reward("siglip_t", arguments, seed=0)
    batch = make_batch([1, 1, 0.4, 0.8])
    features = list(batch.features or ())
    features[3] = features[3][[0, *range(len(features[3]) - 1, 0, -1)]]
    again = make_batch([1, 1, 0.4, 0.8], features=tuple(features))
    np.testing.assert_allclose(reward(batch).progress, reward(again).progress, atol=1e-6)
