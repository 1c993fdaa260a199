"""docs/add-a-reward.md, as written."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from documented_reward import PAGE, documented_code, write_documented_reward
from planted_world import make_batch

from verl_vla.rewards import complete, judge, load_reward

MAX_LINES = 20


@pytest.fixture
def brisk(tmp_path) -> str:
    lines = [line for line in documented_code().splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES
    return write_documented_reward(tmp_path)


def test_the_reward_of_the_page_is_loaded_by_path_and_scores(brisk):
    reward = load_reward(brisk, {"alpha": 0.3})
    resting = np.zeros((5, 8), np.float32)
    reaching = resting.copy()
    reaching[:, 0] = np.linspace(0, 0.15, 5)
    batch = replace(make_batch([1, 0.5, 0.5]), proprio=(resting, resting, reaching), features=None)
    result = judge(reward, complete(reward, batch))
    np.testing.assert_allclose(result.score, [1.0, 0.0, 0.15], atol=1e-6)
    assert result.status == ("success", "shaped", "shaped")
    assert dict(reward.update(batch)) == reward.state_dict() == {}


def test_every_file_that_the_page_names_exists():
    links = re.findall(r"\]\((\S+?)\)", PAGE.read_text())
    assert links and all((PAGE.parent / link).is_file() for link in links)
