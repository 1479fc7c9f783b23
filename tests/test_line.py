from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from async_sessions.dispatch._line import Line

_arrivals = count(1)


@dataclass(eq=False)
class Waiter:
    name: str
    priority: int = 0
    kind: str = "cpu"
    alone: bool = False
    arrival: int = field(default_factory=lambda: next(_arrivals))

    @property
    def session_key(self) -> str:
        return self.name[0]


def line(*waiters: Waiter | str, max_running: int | None = None) -> Line[Waiter]:
    """Of those jobs, in that order; a text is a job's name, the first letter of which is its session."""
    made: Line[Waiter] = Line(max_running)
    for each in waiters:
        made.add(each if isinstance(each, Waiter) else Waiter(each))
    return made


def order(of: Line[Waiter]) -> list[str]:
    return [waiter.name for waiter in of.order()]


def take(of: Line[Waiter], kind: str = "cpu") -> str | None:
    taken = of.take(kind, [])
    return None if taken is None else taken.name


def served(of: Line[Waiter]) -> list[str]:
    names = []
    while (name := take(of)) is not None:
        names.append(name)
    return names


def test_the_job_of_a_session_with_one_is_second_however_many_another_has() -> None:
    jobs = line(*[f"a{number}" for number in range(20)], "b")
    assert order(jobs)[:3] == ["a0", "b", "a1"]
    assert served(jobs)[:3] == ["a0", "b", "a1"]


def test_it_is_second_also_where_it_comes_after_the_first_was_begun() -> None:
    jobs = line("a0", "a1", "a2")
    assert take(jobs) == "a0"
    jobs.add(Waiter("b"))
    assert order(jobs) == ["b", "a1", "a2"]


def test_the_higher_priority_goes_first_whoever_was_served_last() -> None:
    jobs = line("a0", "b0", Waiter("a1", priority=1), Waiter("b1", priority=-1))
    assert served(jobs) == ["a1", "b0", "a0", "b1"]


def test_sessions_that_come_anew_again_and_again_keep_none_waiting_for_ever() -> None:
    jobs = line(*[f"a{number}" for number in range(5)])
    ran: list[str | None] = []
    for newcomer in "bcdefghij":
        ran.append(take(jobs))
        jobs.add(Waiter(newcomer))
    assert ran == ["a0", "b", "a1", "c", "d", "a2", "e", "f", "g"]


def test_a_session_that_submits_again_as_soon_as_it_was_served_takes_turns_too() -> None:
    jobs = line(*[f"a{number}" for number in range(6)], "b0")
    ran = []
    for number in range(1, 6):
        ran.append(take(jobs))
        if ran[-1] is not None and ran[-1].startswith("b"):
            jobs.add(Waiter(f"b{number}"))
    assert ran == ["a0", "b0", "a1", "b2", "a2"]


def test_the_order_that_is_told_is_the_one_in_which_jobs_are_taken() -> None:
    for seed in range(200):
        dice = random.Random(seed)
        jobs = line()
        for number in range(dice.randrange(30)):
            jobs.add(Waiter(f"{dice.choice('abcd')}{number}", priority=dice.choice([0, 0, 0, 1, -1])))
            if not dice.randrange(4):
                take(jobs)
        assert order(jobs) == served(jobs), f"with seed {seed}"


def test_between_any_two_jobs_of_a_session_every_other_one_that_waits_has_its_turn() -> None:
    for seed in range(50):
        dice = random.Random(seed)
        jobs = line(*[f"{dice.choice('abcde')}{number}" for number in range(60)])
        left = Counter(waiter.session_key for waiter in jobs.order())
        since: dict[str, set[str]] = {}
        while (name := take(jobs)) is not None:
            others = {key for key, jobs_left in left.items() if jobs_left and key != name[0]}
            assert others <= since.get(name[0], others), f"with seed {seed}"
            left[name[0]] -= 1
            for turns in since.values():
                turns.add(name[0])
            since[name[0]] = set()


def test_a_device_takes_jobs_of_its_kind_only() -> None:
    jobs = line(Waiter("a0", kind="cuda"), "a1", Waiter("b0", kind="cuda"))
    assert take(jobs, "cpu") == "a1"
    assert take(jobs, "cpu") is None
    assert take(jobs, "cuda") == "b0"
    assert take(jobs, "cuda") == "a0"


def test_a_session_has_no_more_jobs_under_way_than_it_may() -> None:
    jobs = line("a0", "a1", "b0", max_running=1)
    first = jobs.take("cpu", [])
    assert first is not None
    second = jobs.take("cpu", [first])
    assert second is not None
    assert (first.name, second.name) == ("a0", "b0")
    assert jobs.take("cpu", [first, second]) is None
    third = jobs.take("cpu", [second])
    assert third is not None
    assert third.name == "a1"


def test_an_alone_job_whose_turn_it_is_waits_until_nothing_is_under_way_and_lets_nothing_begin() -> None:
    jobs = line(Waiter("a0", alone=True), "b0")
    running = Waiter("c0")
    assert jobs.take("cpu", [running]) is None
    assert jobs.take("cuda", []) is None
    alone = jobs.take("cpu", [])
    assert alone is not None
    assert alone.name == "a0"
    assert jobs.take("cpu", [alone]) is None
    assert take(jobs) == "b0"


def test_an_alone_job_that_is_not_yet_due_keeps_nothing_waiting() -> None:
    jobs = line("b0", Waiter("a0", priority=-1, alone=True))
    taken = jobs.take("cpu", [Waiter("c0")])
    assert taken is not None
    assert taken.name == "b0"


def test_nothing_is_remembered_of_sessions_that_are_gone() -> None:
    jobs = line()
    for number in range(100):
        jobs.add(Waiter(chr(200 + number)))
        take(jobs)
    assert len(jobs._served) <= 2
