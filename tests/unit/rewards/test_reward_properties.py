"""What must hold of every shaped reward for any batch, not for chosen ones."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from planted_world import make_batch

from verl_vla.core.plugins import import_file
from verl_vla.rewards import REWARDS_FOLDER, load_reward

SRPO: Any = import_file(Path(REWARDS_FOLDER) / "srpo.py")
NUM_MOVED = 12
"""Rows after the first of an episode made here."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "knn_align": ("knn_align", {}),
    "srpo": ("srpo", {}),
    "additive": ("siglip_t", {"temporal": "additive", "pooling": "last_k"}),
    "causal": ("siglip_t", {"head_steps": 5, "head_width": 8}),
}
few = hypothesis.settings(max_examples=15)
reached = st.lists(st.one_of(st.just(1.0), st.floats(0.05, 0.95)), min_size=8, max_size=8)


def make(kind: str) -> Any:
    name, own = KINDS[kind]
    return load_reward(name, {"encoder": "pixels", "max_invalid_share": 1.0, **own}, seed=0)


TAUGHT = {kind: make(kind) for kind in KINDS}
for _made in TAUGHT.values():
    _made.update(
        make_batch(
            [1] * 6 + [0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.2], seed=77, first_id=10_000
        )
    )


def pick(batch, order):
    changed: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, tuple):
            changed[f.name] = tuple(value[i] for i in order)
        elif isinstance(value, np.ndarray):
            changed[f.name] = value[order]
    return replace(batch, **changed)


@pytest.mark.parametrize("kind", KINDS)
@few
@hypothesis.given(reached=reached, seed=st.integers(0, 99))
def test_permuting_the_episodes_permutes_the_scores(kind, reached, seed):
    batch = make_batch(reached, seed=seed)
    order = np.random.default_rng(seed).permutation(len(batch))
    straight, mixed = TAUGHT[kind](batch), TAUGHT[kind](pick(batch, order))
    np.testing.assert_allclose(mixed.score, straight.score[order], atol=1e-6)
    assert mixed.status == tuple(straight.status[i] for i in order)


@pytest.mark.parametrize("kind", KINDS)
@few
@hypothesis.given(
    reached=reached,
    seed=st.integers(0, 99),
    broken=st.sets(st.integers(0, 7)),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e30]),
)
def test_a_success_is_one_and_a_failure_at_most_alpha_whatever_the_features(
    kind, reached, seed, broken, value
):
    batch = make_batch(reached, seed=seed)
    features = tuple(
        np.full_like(f, value) if i in broken else f for i, f in enumerate(batch.features or ())
    )
    result = TAUGHT[kind](replace(batch, features=features))
    assert (result.score[batch.success] == 1).all()
    failed = result.score[~batch.success]
    assert ((failed >= 0) & (failed <= np.float32(TAUGHT[kind]._alpha))).all()


@pytest.mark.parametrize("kind", KINDS)
@few
@hypothesis.given(reached=reached, seed=st.integers(0, 99), size=st.floats(10, 1e4))
def test_an_outlier_among_the_failures_moves_nobody_else(kind, reached, seed, size):
    """Where scores are stretched over the batch, as in the release, it moves everybody."""
    batch = make_batch([*reached[:7], 0.5], seed=seed)
    wild = tuple(f if i < 7 else (f * np.float32(size)) for i, f in enumerate(batch.features or ()))
    calm, stormy = TAUGHT[kind](batch), TAUGHT[kind](replace(batch, features=wild))
    # a group whose failures lie within the noise is opened by an outlier in it, and only then
    same = [i for i in range(7) if calm.status[i] == stormy.status[i]]
    assert set(range(4)) <= set(same)
    np.testing.assert_allclose(stormy.score[same], calm.score[same], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@few
@hypothesis.given(reached=reached, seed=st.integers(0, 99))
def test_another_task_in_the_batch_changes_nothing(kind, reached, seed):
    batch = make_batch(reached, seed=seed, tasks=[0] * 4 + [1] * 4)
    alone = TAUGHT[kind](pick(batch, np.arange(4)))
    np.testing.assert_allclose(TAUGHT[kind](batch).score[:4], alone.score, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@few
@hypothesis.given(reached=reached, seed=st.integers(0, 99))
def test_groups_without_successes_score_the_same_alone_and_together(kind, reached, seed):
    batch = make_batch([min(r, 0.95) for r in reached], seed=seed)
    together = TAUGHT[kind](batch).score
    apart = [TAUGHT[kind](pick(batch, np.arange(4) + start)).score for start in (0, 4)]
    np.testing.assert_allclose(np.concatenate(apart), together, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_state_written_and_read_goes_on_alike(kind, tmp_path):
    torch.save(TAUGHT[kind].state_dict(), tmp_path / "state.pt")
    again = make(kind)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps = [
        make_batch([1, 0.5, 0.2, 0.9, 1, 1, 0.3, 0.7], seed=s, first_id=50 * s) for s in (1, 2)
    ]
    kept = make(kind)
    kept.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in steps:
        np.testing.assert_array_equal(again(step).score, kept(step).score)
        assert dict(again.update(step)) == dict(kept.update(step))
    np.testing.assert_array_equal(TAUGHT[kind](steps[0]).score.shape, again(steps[0]).score.shape)


@pytest.mark.parametrize("kind", ["knn_align", "srpo"])
def test_nearer_to_the_successes_is_never_worth_less(kind):
    """From where a success began, straight to what this reward holds failures against."""
    taught = TAUGHT[kind]
    batch = make_batch([0.1, 0.1, 0.1, 0.1])
    kept = [r.features for r in taught._memory.of_task("mini/0")]
    start, end = kept[0][:1], kept[0][-1:]
    if kind == "srpo":
        centres = SRPO.cluster_centres(np.stack([taught._embed(rows) for rows in kept]))
        nearest = centres[np.linalg.norm(centres, axis=1).argmin()]
        end = start + nearest * (NUM_MOVED + 1) / NUM_MOVED  # whose mean over rows is the centre
    mixed = tuple(
        np.concatenate([start, np.repeat((1 - share) * start + share * end, NUM_MOVED, axis=0)])
        for share in (0.0001, 0.3, 0.6, 1.0)
    )
    moved = replace(batch, features=tuple(rows.astype(np.float32) for rows in mixed))
    progress = taught(moved).progress
    assert progress[0] <= progress[1] <= progress[2] <= progress[3]
    assert progress[0] < progress[3]
