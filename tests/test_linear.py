from __future__ import annotations

from pathlib import Path

import pytest

from tests import linear
from tests.linear import Operation, linearizable


def history(*operations: tuple[str, str | None, float, float]) -> list[Operation]:
    return [Operation("start", *operation) for operation in operations]


def test_what_happened_one_at_a_time_is_linearizable() -> None:
    assert linearizable(
        history(
            ("read", None, 0, 1), ("write", "a", 2, 3), ("read", "a", 4, 5), ("write", "b", 6, 7), ("read", "b", 8, 9)
        )
    )


def test_operations_at_the_same_time_may_take_effect_in_any_order() -> None:
    assert linearizable(history(("write", "a", 0, 9), ("write", "b", 0, 9), ("read", "b", 1, 2), ("read", "a", 3, 4)))
    assert linearizable(history(("write", "a", 0, 9), ("read", None, 1, 2), ("read", "a", 3, 4)))


@pytest.mark.parametrize(
    "operations",
    [
        pytest.param([("write", "a", 0, 1), ("read", None, 2, 3)], id="a lost write"),
        pytest.param([("write", "a", 0, 1), ("write", "b", 2, 3), ("read", "a", 4, 5)], id="a stale read"),
        pytest.param(
            [("write", "a", 0, 9), ("write", "b", 0, 9), ("read", "a", 1, 2), ("read", "b", 3, 4), ("read", "a", 5, 6)],
            id="there and back",
        ),
        pytest.param(
            [("write", "a", 0, 1), ("write", "b", 2, 3), ("read", "a", 2, 5), ("read", "a", 4, 5)], id="a write undone"
        ),
        pytest.param([("read", "a", 0, 1), ("write", "a", 2, 3)], id="from the future"),
        pytest.param([("read", "a", 0, 1)], id="from nowhere"),
    ],
)
def test_what_cannot_have_happened_one_at_a_time_is_not(operations: list[tuple[str, str | None, float, float]]) -> None:
    assert not linearizable(history(*operations))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_processes_on_one_session_are_linearizable(tmp_path: Path) -> None:
    assert await linear.check(tmp_path / "root", processes=4, operations=25) == 100
