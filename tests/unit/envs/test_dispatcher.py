"""Which worker does what next: simulators are slow to build, so tasks stay where they are."""

from dataclasses import dataclass, field

from verl_vla.envs.pool.dispatcher import best_pair
from verl_vla.envs.pool.messages import StartEpisode


@dataclass(eq=False)
class Worker:
    tasks: dict[int, float] = field(default_factory=dict)


def requests(*task_ids: int) -> list[StartEpisode]:
    return [
        StartEpisode(slot=slot, task_id=task_id, init_state_id=0)
        for slot, task_id in enumerate(task_ids)
    ]


def test_whoever_served_a_task_last_serves_it_again():
    long_ago, lately = Worker({0: 1.0}), Worker({0: 2.0})
    worker, request = best_pair([long_ago, lately], [long_ago, lately], requests(0))
    assert worker is lately
    assert request.task_id == 0


def test_a_familiar_task_goes_before_an_older_request():
    worker = Worker({5: 1.0, 6: 2.0})
    assert best_pair([worker], [worker], requests(4, 5, 6, 6))[1].slot == 2


def test_among_requests_for_one_task_the_oldest_goes_first():
    worker = Worker({6: 1.0})
    assert best_pair([worker], [worker], requests(4, 6, 6))[1].slot == 1
    fresh = Worker()
    assert best_pair([fresh], [fresh], requests(4, 4))[1].slot == 0


def test_a_busy_worker_is_never_chosen():
    busy, idle = Worker({0: 1.0}), Worker()
    worker, request = best_pair([busy, idle], [idle], requests(0))
    assert worker is idle
    assert request.task_id == 0


def test_a_task_that_nobody_holds_is_begun_before_one_is_held_twice():
    busy, fresh = Worker({0: 1.0}), Worker()
    worker, request = best_pair([busy, fresh], [fresh], requests(0, 0, 1))
    assert worker is fresh
    assert request.task_id == 1


def test_an_unknown_task_goes_to_the_worker_that_holds_least():
    full, empty = Worker({0: 1.0}), Worker()
    worker, _ = best_pair([full, empty], [full, empty], requests(7))
    assert worker is empty
