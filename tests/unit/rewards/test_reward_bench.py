"""The benchmark on a planted world whose images show true progress, and its words and tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_world import NUM_GROUPS, make_trajectories

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import RewardResult, StatelessReward, load_reward
from verl_vla.rewards.benchmark import (
    BenchConfig,
    BenchRow,
    Sample,
    describe,
    draw_features,
    draw_progress,
    draw_reliability,
    halve,
    make_entries,
    make_sample,
    measure,
    paper_table,
    ranking_table,
    read_rewards,
    table_as_json,
    verdicts,
)
from verl_vla.rewards.benchmark.bench import advantage_changes
from verl_vla.rewards.benchmark.plots import in_two_dimensions
from verl_vla.rewards.encoders.base import ImageEncoder
from verl_vla.rl.advantage import group_advantage

ROOT = Path(__file__).resolve().parents[3]
CONFIG = BenchConfig(curve_groups=4, curve_points=4, resamples=200)
REWARDS = "binary,knn=knn_align,head=siglip_t,released=srpo_released"
ARGUMENTS = [
    "knn.encoder=pixels",
    "head.encoder=pixels",
    "released.encoder=pixels",
    "released.video_every=0",
]


@pytest.fixture(scope="module")
def halves() -> tuple[Sample, Sample]:
    return halve(make_sample(make_trajectories(), suite="mini", split="train", mirrored=True))


@pytest.fixture(scope="module")
def rows(halves) -> dict[str, BenchRow]:
    entries = make_entries(read_rewards(REWARDS, ARGUMENTS), seed=0)
    return {row.label: row for row in measure(entries, {None: halves}, CONFIG)}


def test_every_reward_has_a_row_and_those_of_frames_a_shuffled_one(rows):
    looking = ["knn", "head", "released"]
    shuffled = [f"{label}, shuffled" for label in looking]
    assert set(rows) == {"binary", *looking, *shuffled, "clock", "random", "oracle"}
    assert {label for label, row in rows.items() if row.is_control} == {
        *shuffled,
        "clock",
        "random",
        "oracle",
    }


def test_the_oracle_ranks_perfectly_and_random_does_not_rank(rows):
    oracle, random = rows["oracle"].by_progress, rows["random"].by_progress
    assert oracle.spearman.low == oracle.pair_accuracy.value == pytest.approx(1.0)
    assert oracle.near_miss_auroc.value == 1.0
    assert random.spearman.low < 0 < random.spearman.high
    found = verdicts(list(rows.values()))
    assert found["oracle"].ranks_failures and found["oracle"].beats_the_clock
    assert found["random"].ranks_failures is False


def test_what_gives_all_failures_the_same_ranks_nothing_and_is_not_called_zero(rows):
    for label in ("clock", "binary"):
        row = rows[label]
        assert math.isnan(row.by_progress.spearman.value)
        assert row.by_progress.spearman.count == rows["oracle"].by_progress.spearman.count
        assert row.by_progress.pair_accuracy.value == 0.5
        assert row.largest_change < 1e-4
        assert row.changes_advantage.value == 0.0


def test_what_looks_at_images_ranks_and_shuffling_destroys_what_is_temporal(rows):
    """The last rows of a failure tell how far it came; in random order any row is the last."""
    for label in ("knn", "head"):
        ordered, mixed = rows[label], rows[f"{label}, shuffled"]
        assert ordered.by_progress.spearman.value > 0.85
        assert mixed.by_progress.spearman.value < ordered.by_progress.spearman.value - 0.05
        assert ordered.changes_advantage.value > 0.5


def test_the_release_differs_from_the_outcome_in_nothing(rows):
    released = rows["released"]
    assert released.changes_advantage.value == 0.0
    assert released.largest_change < 1e-4


def test_curves_are_made_without_the_outcome(rows):
    """At the end of a success a reward that knew of it would say 1."""
    assert rows["oracle"].paper is not None and rows["clock"].paper is not None
    assert rows["clock"].paper.sc == pytest.approx(1.0, abs=0.02)
    assert rows["clock"].paper.mono == 1.0
    assert all(np.unique(curve).tolist() == [0.0] for curve in rows["binary"].readings.curves)
    assert rows["knn"].paper.mono > 0.9 and rows["knn"].paper.smd > 1
    assert rows["knn, shuffled"].paper is None


def test_the_same_call_gives_the_same_numbers(halves, rows):
    entries = make_entries(read_rewards("head=siglip_t", ["head.encoder=pixels"]), seed=0)
    again = measure(entries, {None: halves}, CONFIG)
    for row in again:
        first = rows[row.label]
        assert np.array_equal(row.readings.progress, first.readings.progress)
        assert row.by_progress == first.by_progress or math.isnan(row.by_progress.spearman.low)


def test_nothing_is_learned_from_the_half_that_is_judged(halves):
    train, test = halves
    (knn,) = make_entries(read_rewards("knn_align", ["knn_align.encoder=pixels"]), seed=0)[:1]
    measure([knn], {None: (train, test)}, replace(CONFIG, groups_per_update=5))
    memory: Any = knn.reward.state_dict()["memory"]
    kept = {r["episode_id"] for task in memory["tasks"].values() for r in task}
    assert kept <= set(train.batch.episode_id[train.batch.success].tolist())
    # eight groups, five to an update
    assert kept and memory["num_updates"] == 2


class ClipEncoder:
    """Its rows depend on the length of the clip, so a part cannot be cut from the whole."""

    feature_space = "clips"

    def encode(self, frames):
        return [
            np.stack([np.full(len(clip), len(clip)), clip.mean(axis=(1, 2, 3))], axis=1).astype(
                "f4"
            )
            for clip in frames
        ]


def test_an_encoder_of_clips_is_asked_again_for_each_part(halves):
    reward: Any = load_reward("knn_align", {"encoder": "pixels"})
    assert isinstance(reward.encoder, ImageEncoder)
    reward.encoder = ClipEncoder()
    seen: set[int] = set()

    def measure_lengths(task_key, episodes, references):
        assert all((rows[:, 0] == len(rows)).all() for rows in episodes)
        seen.update(len(rows) for rows in episodes)
        return np.array([float(len(rows)) for rows in episodes])

    reward.measure = measure_lengths
    entry = replace(make_entries({}, 0)[0], label="clips", reward=reward)
    rows = measure([entry], {None: halves}, CONFIG)
    assert {2, 9} <= seen, "one policy step shows the start and what came of it"
    assert rows[0].readings.curves[0][0] == 2.0


def test_advantages_are_compared_with_those_of_the_outcome(halves):
    batch = halves[1].batch
    score = np.where(batch.success, 1.0, 0.0).astype(np.float32)
    first = int(np.flatnonzero(~batch.success)[0])
    score[first] = 0.5
    result = RewardResult(score=score, progress=score, status=("",) * len(score))
    changes = advantage_changes(batch, result)
    group = torch.from_numpy(batch.group_id)
    expected = group_advantage(torch.from_numpy(score), group) - group_advantage(
        torch.from_numpy(batch.success.astype(np.float32)), group
    )
    place = int(np.flatnonzero(np.unique(batch.group_id) == batch.group_id[first])[0])
    assert changes[place] == pytest.approx(float(expected.abs().max()))
    assert np.flatnonzero(changes).tolist() == [place]


class FailedOnly(StatelessReward):
    """Knows nothing of failures."""

    def __call__(self, batch):
        progress = np.where(batch.success, 1.0, np.nan).astype(np.float32)
        score = batch.success.astype(np.float32)
        return RewardResult(score=score, progress=progress, status=("",) * len(score))


def test_a_reward_that_knows_no_failure_is_unknown_with_count_zero(halves):
    entry = replace(make_entries({}, 0)[0], label="blind", reward=FailedOnly())
    clock = make_entries({}, 0)[0]
    rows = measure([entry, clock], {None: halves}, replace(CONFIG, curve_groups=0))
    assert rows[0].by_progress.spearman.count == 0
    assert rows[0].paper is None
    found = table_as_json(rows, verdicts(rows))["blind"]
    assert found["by_progress"]["spearman"] == {"value": None, "ci95": [None, None], "count": 0}
    assert found["verdict"] == {"ranks_failures": None, "beats_the_clock": None}
    json.dumps(found, allow_nan=False)


def test_tables_and_images_hold_every_row(rows, halves, tmp_path: Path):
    every = list(rows.values())
    table = ranking_table(every, verdicts(every)).splitlines()
    assert len(table) == 1 + len(every) and len(set(map(len, table))) == 1
    assert "yes" in next(line for line in table if line.startswith("oracle"))
    assert len(paper_table(every).splitlines()) == 1 + sum(r.paper is not None for r in every)
    json.dumps(table_as_json(every, verdicts(every)), allow_nan=False)
    success, truth = halves[1].batch.success, halves[1].truth
    draw_progress(tmp_path / "p.png", every, success)
    draw_reliability(tmp_path / "r.png", every, truth, success)
    assert draw_features(tmp_path / "f.png", every, truth, success)
    assert not draw_features(tmp_path / "none.png", [rows["clock"]], truth, success)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["f.png", "p.png", "r.png"]
    assert all(f.stat().st_size > 5000 for f in tmp_path.iterdir())


def test_what_there_is_to_rank_is_counted(halves):
    test = halves[1]
    found = describe(test)
    failures = test.truth[~test.batch.success]
    assert found["failures"] == len(failures) == len(test) - found["successes"]
    assert found["near_misses"] == (failures >= 0.7).sum()
    assert found["far_misses"] == (failures <= 0.3).sum()
    assert found["groups"] == NUM_GROUPS // 2


def test_what_is_near_stays_near_in_two_dimensions():
    rng = np.random.default_rng(0)
    kinds = np.repeat([0.0, 20.0, 40.0], 12)
    plane = in_two_dimensions(kinds[:, None] + rng.normal(size=(36, 5)))
    distance = np.linalg.norm(plane[:, None] - plane[None], axis=2) + np.diag(np.full(36, np.inf))
    assert (kinds[distance.argmin(axis=1)] == kinds).all()
    assert in_two_dimensions(np.ones((4, 1))).shape == (4, 2)


def test_rewards_are_named_by_words_or_by_a_file(tmp_path: Path):
    words = read_rewards(
        "binary,a=srpo", ["a.encoder=pixels", "a.encoder_args.grid=4", "a.from_start=false"]
    )
    file = tmp_path / "rewards.yaml"
    file.write_text("binary: {reward: binary}\na: {reward: srpo, reward_args: {encoder: pixels}}\n")
    assert read_rewards(str(file), ["a.encoder_args.grid=4", "a.from_start=false"]) == words
    assert words["a"].reward_args == {
        "encoder": "pixels",
        "encoder_args": {"grid": 4},
        "from_start": False,
    }
    assert [c.label for c in make_entries(words, 0)] == [
        "binary",
        "a",
        "clock",
        "random",
        "oracle",
    ]


def test_the_rewards_of_the_experiment_can_be_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    made = make_entries(read_rewards("docs/experiments/rewards.yaml", []), 0)
    page = (ROOT / "docs/experiments/rewards.md").read_text()
    kinds = {type(c.reward).__name__ for c in made if not c.is_control}
    assert kinds == {
        "BinaryReward",
        "KnnAlignReward",
        "SiglipTReward",
        "SrpoReleasedReward",
        "SrpoReward",
    }
    assert "--rewards docs/experiments/rewards.yaml" in page


@pytest.mark.parametrize(
    ("words", "arguments", "message"),
    [
        ("", [], "write NAME,LABEL=NAME"),
        ("a=", [], "write NAME,LABEL=NAME"),
        ("srpo,srpo", [], "'srpo' stands twice in --rewards"),
        ("clock", [], "'clock' is always measured"),
        ("binary", ["binary"], "is no argument; write LABEL.KEY=VALUE"),
        ("srpo", ["spro.encoder=pixels"], "there is no reward 'spro'; did you mean 'srpo'"),
        ("srpo", ["srpo.a=1", "srpo.a.b=2"], "a is 1, which has no keys"),
        ("none.yaml", [], "there is no such file"),
    ],
)
def test_words_that_cannot_be_are_refused(words: str, arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        read_rewards(words, arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a]", "must hold a mapping"),
        ("a: srpo", "write {reward: NAME}"),
        ("a: {rewards: srpo}", "unknown key 'a.rewards'; did you mean 'a.reward'"),
        ("a: {reward: srpo", "is no YAML"),
    ],
)
def test_a_file_that_cannot_be_is_refused(content: str, message: str, tmp_path: Path):
    file = tmp_path / "rewards.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_rewards(str(file), [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"srpo: reward 'srpo' needs 'encoder'.*--reward-args srpo\.KEY=VALUE"),
        (["srpo.encoder=pixels", "srpo.alhpa=1"], "no argument 'alhpa'; did you mean 'alpha'"),
    ],
)
def test_arguments_are_checked_like_those_of_a_recipe(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        make_entries(read_rewards("srpo", arguments), 0)


@pytest.mark.parametrize(
    "options",
    [{"groups_per_update": 0}, {"curve_groups": -1}, {"curve_points": 1}, {"resamples": 0}],
)
def test_an_impossible_benchmark_is_refused(options: dict[str, int]):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is"):
        BenchConfig(**options)
