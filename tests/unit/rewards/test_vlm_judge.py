"""The judge against a server that speaks OpenAI's protocol and judges by brightness."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from judge_server import MODEL, judge_server, url_of

from verl_vla.core.errors import ConfigError, RewardError
from verl_vla.rewards import TrajectoryBatch, load_reward

INSTRUCTIONS = {"mini/0": "push the red cube"}


@pytest.fixture
def server():
    with judge_server() as running:
        yield running


@pytest.fixture
def judge(server):
    def make(**arguments):
        known = {"model": MODEL, "instructions": INSTRUCTIONS, "url": url_of(server)}
        return load_reward("vlm_judge", known | arguments, seed=0)

    return make


def episodes(*lights: float, solved: tuple[int, ...] = (), task: str = "mini/0") -> TrajectoryBatch:
    """Each of 20 policy steps, dark at first and at last as bright as said."""
    num = len(lights)
    frames = [np.zeros((20, 1, 16, 16, 3), dtype=np.uint8) for _ in lights]
    for images, light in zip(frames, lights, strict=True):
        images[-1] = round(255 * light)
    return TrajectoryBatch(
        episode_id=np.arange(num),
        group_id=np.zeros(num, dtype=np.int64),
        task_key=(task,) * num,
        init_state_id=np.zeros(num, dtype=np.int64),
        success=np.isin(np.arange(num), solved),
        num_steps=np.full(num, 160),
        frames=tuple(frames),
        proprio=None,
    )


def test_failures_are_worth_what_the_judge_sees_and_successes_are_not_shown(server, judge):
    result = judge(alpha=0.5)(episodes(0.2, 0.0, 0.8, solved=(1,)))
    np.testing.assert_allclose(result.score, [0.1, 1.0, 0.4], atol=0.01)
    np.testing.assert_allclose(result.progress, [0.2, 1.0, 0.8], atol=0.01)
    assert result.status == ("failure", "success", "failure")
    assert len(server.asked) == 2


def test_the_judge_is_asked_as_openai_is(server, judge):
    judge(num_frames=5)(episodes(0.5))
    [body] = server.asked
    [message] = body["messages"]
    text, *images = message["content"]
    assert (body["model"], body["temperature"], message["role"]) == (MODEL, 0, "user")
    assert body["response_format"]["type"] == "json_schema"
    assert "push the red cube" in text["text"]
    assert "5 images" in text["text"]
    assert len(images) == 5


@pytest.mark.parametrize("mirrored", [True, False])
def test_the_judge_sees_left_and_right_as_a_person_does(server, judge, mirrored):
    batch = episodes(0.0)
    batch.frames[0][:, 0, :, :4] = 255  # bright at the left of what the policy sees
    judge(num_frames=1)(replace(batch, mirrored=mirrored))
    [body] = server.asked
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    image = simplejpeg.decode_jpeg(base64.b64decode(url.split(",")[1])).astype(int)
    left, right = image[:, :4].mean(), image[:, -4:].mean()
    assert (right > left + 200) if mirrored else (left > right + 200)


def test_a_short_episode_shows_all_it_has(server, judge):
    batch = episodes(0.5)
    judge(num_frames=64)(batch)
    assert len(server.asked[0]["messages"][0]["content"]) == 1 + 20


def test_few_unanswered_failures_score_nothing_and_many_stop_the_run(judge):
    batch = episodes(0.0, 0.5)
    with pytest.raises(RewardError, match="left 1 of 2 failures without an answer"):
        judge()(batch)
    result = judge(max_lost_share=0.5)(batch)
    assert result.status == ("lost", "failure")
    assert result.score[0] == 0
    assert np.isnan(result.progress[0])
    assert result.metrics == {"lost": 1.0}


def test_a_server_that_went_away_is_noticed(server, judge):
    reward = judge()
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match="left 2 of 2"):
        reward(episodes(0.5, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "other"}, "reward_args.model is 'other', but .* serves judge"),
        ({"url": "http://127.0.0.1:9/v1"}, "no judge answers at .* install the extra vllm"),
        ({"alpha": 1.0}, "reward_args.alpha is 1.0"),
        ({"num_frames": 0}, "reward_args.num_frames is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(judge, arguments, message):
    with pytest.raises(ConfigError, match=message):
        judge(**arguments)


def test_a_task_without_an_instruction_is_refused(judge):
    with pytest.raises(ConfigError, match="has none for 'mini/3'"):
        judge()(episodes(0.5, task="mini/3"))
