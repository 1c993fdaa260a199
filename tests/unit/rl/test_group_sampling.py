"""Where episodes start, and the account of a training step with dynamic sampling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_vla.config.grpo import SamplingConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError, SolvedError, StarvedError
from verl_vla.rl.group_sampling import GroupFilter, GroupResult, StartSampler

STARTS = tuple(Start(task_id=t, init_state_id=s) for t in range(3) for s in range(4))


def make_sampler(seed: int = 0, group_size: int = 4) -> StartSampler:
    return StartSampler(STARTS, seed=seed, group_size=group_size)


def make_group_filter(groups_per_step: int = 4, max_rounds: int = 3, **options) -> GroupFilter:
    return GroupFilter(
        config=SamplingConfig(groups_per_step=groups_per_step, max_rounds=max_rounds, **options)
    )


def group(
    group_id: int, solved: int = 0, failed: int = 0, crashed: int = 0, spread: float | None = None
) -> GroupResult:
    """By default the reward is the outcome."""
    return GroupResult(
        group_id=group_id,
        task_id=0,
        num_solved=solved,
        num_failed=failed,
        num_crashed=crashed,
        score_spread=float(solved > 0 and failed > 0) if spread is None else spread,
    )


def mixed(group_id: int) -> GroupResult:
    return group(group_id, solved=3, failed=5)


def agreeing(group_id: int) -> GroupResult:
    return group(group_id, failed=8)


def test_a_group_is_one_start_played_group_size_times():
    for specs in make_sampler().next_groups(5):
        assert len(specs) == 4
        assert len({(s.task_id, s.init_state_id, s.group_id) for s in specs}) == 1


def test_episode_and_group_ids_never_come_twice():
    sampler = make_sampler()
    groups = sampler.next_groups(20) + sampler.next_groups(17)
    assert [g[0].group_id for g in groups] == list(range(37))
    assert [s.episode_id for g in groups for s in g] == list(range(37 * 4))


def test_each_lap_visits_every_start_once_in_an_order_of_its_own():
    groups = make_sampler().next_groups(3 * len(STARTS))
    visited = [Start(task_id=g[0].task_id, init_state_id=g[0].init_state_id) for g in groups]
    laps = [tuple(visited[i : i + len(STARTS)]) for i in range(0, len(visited), len(STARTS))]
    assert all(set(lap) == set(STARTS) for lap in laps)
    assert len(set(laps)) == 3


@given(st.lists(st.integers(0, 9), max_size=6))
def test_the_groups_of_a_run_do_not_depend_on_how_many_are_drawn_at_a_time(numbers):
    sampler = make_sampler()
    piecewise = [g for number in numbers for g in sampler.next_groups(number)]
    assert piecewise == make_sampler().next_groups(sum(numbers))
    assert sampler.num_groups_sampled == sum(numbers)


def test_a_restored_count_goes_on_where_the_run_stood():
    whole = make_sampler().next_groups(30)
    resumed = make_sampler()
    resumed.num_groups_sampled = 19
    assert resumed.next_groups(11) == whole[19:]


def test_another_seed_is_another_order():
    assert make_sampler(seed=0).next_groups(12) != make_sampler(seed=1).next_groups(12)


@pytest.mark.parametrize(
    ("solved", "failed", "informative", "comparable"),
    [
        (4, 4, True, True),
        (1, 1, True, True),
        (8, 0, False, True),
        (0, 8, False, True),
        (1, 0, False, False),
        (0, 0, False, False),
    ],
)
def test_a_group_is_judged_by_those_who_survived(solved, failed, informative, comparable):
    result = group(0, solved, failed, crashed=8 - solved - failed)
    assert result.is_comparable == comparable
    for filter_on in ("outcome", "reward"):
        group_filter = make_group_filter(filter_on=filter_on)
        group_filter.add_round([result])
        assert group_filter.kept == ([0] if informative else [])


@pytest.mark.parametrize(("solved", "failed"), [(0, 8), (8, 0)])
def test_by_choice_a_group_teaches_where_the_reward_tells_its_episodes_apart(solved, failed):
    ranked = group(0, solved, failed, spread=0.2)
    for filter_on, kept in (("outcome", []), ("reward", [0])):
        group_filter = make_group_filter(filter_on=filter_on)
        group_filter.add_round([ranked])
        assert group_filter.kept == kept


def test_a_lone_survivor_is_dropped_whatever_its_score():
    group_filter = make_group_filter(filter_on="reward")
    assert group_filter.add_round([group(0, solved=1, crashed=7, spread=0.2)]) == [0]


def test_a_full_step_needs_no_refill():
    group_filter = make_group_filter()
    assert group_filter.add_round([mixed(i) for i in range(4)]) == []
    assert (group_filter.kept, group_filter.num_to_refill) == ([0, 1, 2, 3], 0)
    group_filter.check_not_starved()


def test_exactly_what_was_dropped_is_played_again():
    group_filter = make_group_filter()
    assert group_filter.add_round([mixed(0), agreeing(1), agreeing(2), mixed(3)]) == [1, 2]
    assert group_filter.num_to_refill == 2
    assert group_filter.add_round([mixed(4), agreeing(5)]) == [5]
    assert group_filter.num_to_refill == 1
    assert group_filter.add_round([mixed(6)]) == []
    assert group_filter.num_to_refill == 0
    assert group_filter.kept == [0, 3, 4, 6]
    assert [g.group_id for g in group_filter.played] == list(range(7))


@given(st.lists(st.booleans(), min_size=40, max_size=40), st.integers(1, 5), st.integers(1, 5))
def test_refilling_ends_with_the_wanted_number_or_at_the_cap(informative, wanted, max_rounds):
    group_filter = make_group_filter(groups_per_step=wanted, max_rounds=max_rounds)
    queue = [mixed(i) if good else agreeing(i) for i, good in enumerate(informative)]
    missing = wanted
    while missing:
        fresh, queue = queue[:missing], queue[missing:]
        before = len(group_filter.kept)
        dropped = group_filter.add_round(fresh)
        assert len(dropped) + len(group_filter.kept) - before == len(fresh)
        missing = group_filter.num_to_refill
        assert missing in (0, wanted - len(group_filter.kept))
    assert len(group_filter.kept) == wanted or group_filter.num_rounds == max_rounds
    assert len(group_filter.kept) <= wanted


def test_at_the_cap_the_step_goes_on_with_what_it_has():
    group_filter = make_group_filter(max_rounds=2)
    group_filter.add_round([agreeing(i) for i in range(4)])
    group_filter.add_round([mixed(4)] + [agreeing(i) for i in range(5, 8)])
    assert (group_filter.num_to_refill, group_filter.kept) == (0, [4])
    group_filter.check_not_starved()


def test_more_than_was_asked_for_is_no_debt():
    group_filter = make_group_filter(groups_per_step=1)
    group_filter.add_round([mixed(0), mixed(1)])
    assert group_filter.num_to_refill == 0


def test_a_crash_makes_a_group_smaller_and_no_worse():
    group_filter = make_group_filter(groups_per_step=2)
    dropped = group_filter.add_round(
        [group(0, solved=1, failed=1, crashed=6), group(1, failed=1, crashed=7)]
    )
    assert (group_filter.kept, dropped, group_filter.num_to_refill) == ([0], [1], 1)


def test_without_dynamic_sampling_agreeing_groups_stay_and_lost_ones_are_replaced():
    group_filter = make_group_filter(groups_per_step=3, dynamic=False)
    dropped = group_filter.add_round([mixed(0), agreeing(1), group(2, solved=1, crashed=7)])
    assert (group_filter.kept, dropped, group_filter.num_to_refill) == ([0, 1], [2], 1)


@pytest.mark.parametrize(
    ("groups", "counts", "remedy"),
    [
        (
            [group(0, failed=8), group(1, failed=7, crashed=1)],
            "0 episodes solved, 15 failed, 1 crashed",
            "too hard for this policy: start from easier tasks",
        ),
        (
            [group(0, solved=8), group(1, solved=8)],
            "16 episodes solved, 0 failed, 0 crashed",
            "the tasks are solved: choose harder ones",
        ),
        (
            [group(0, solved=8), group(1, failed=8)],
            "8 episodes solved, 8 failed, 0 crashed",
            "raise sampling.group_size or sampling.temperature",
        ),
    ],
)
def test_a_starved_step_says_what_was_played_and_what_to_do(groups, counts, remedy):
    group_filter = make_group_filter(groups_per_step=2, max_rounds=1)
    group_filter.add_round(groups)
    with pytest.raises(StarvedError) as caught:
        group_filter.check_not_starved()
    message = str(caught.value)
    assert f"2 groups (16 episodes) were played in 1 rounds, {counts}" in message
    assert remedy in message
    assert message.endswith("or raise sampling.max_rounds (= 1)")


@pytest.mark.parametrize(
    ("groups", "is_solved"),
    [
        ([group(0, solved=8), group(1, solved=7, crashed=1)], True),
        ([group(0, solved=8), group(1, crashed=8)], True),
        ([group(0, solved=8), group(1, failed=8)], False),
        ([group(0, solved=1, crashed=7)], False),
    ],
)
def test_a_step_in_which_nothing_failed_is_told_apart(groups, is_solved):
    group_filter = make_group_filter(groups_per_step=2, max_rounds=1)
    group_filter.add_round(groups)
    with pytest.raises(StarvedError) as caught:
        group_filter.check_not_starved()
    assert isinstance(caught.value, SolvedError) == is_solved


@pytest.mark.parametrize("last", [group(1, crashed=8), group(1, failed=1, crashed=7)])
def test_a_step_lost_to_crashes_does_not_blame_the_tasks(last):
    group_filter = make_group_filter(groups_per_step=2, max_rounds=1)
    group_filter.add_round([group(0, crashed=8), last])
    with pytest.raises(StarvedError) as caught:
        group_filter.check_not_starved()
    message = str(caught.value)
    assert f"{last.num_crashed + 8} crashed" in message
    assert "no group had two episodes left" in message
    assert "tasks are" not in message and "max_rounds" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "sampling.group_size is 1; GRPO compares episodes"),
        ({"groups_per_step": 0}, "sampling.groups_per_step is 0; set at least 1"),
        ({"max_rounds": 0}, "sampling.max_rounds is 0; set at least 1"),
        ({"temperature": 0.0}, "sampling.temperature is 0.0; GRPO needs episodes that differ"),
    ],
)
def test_an_impossible_knob_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**options)
