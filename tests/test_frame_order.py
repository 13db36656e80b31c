import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurender import InputError, frame_order
from gpurender.template import Order


@pytest.mark.parametrize(
    ("count", "order", "start", "expected"),
    [
        (4, "bounce", 0, [1, 2, 3, 2, 1, 0, 1, 2]),
        (4, "bounce", 2, [3, 2, 1, 0, 1, 2]),
        (4, "bounce", 3, [2, 1, 0, 1, 2]),
        (2, "bounce", 0, [1, 0, 1, 0]),
        (2, "bounce", 1, [0, 1, 0, 1]),
        (1, "bounce", 0, [0, 0, 0]),
        (3, "loop", 0, [0, 1, 2, 0, 1]),
        (3, "loop", 2, [2, 0, 1, 2]),
        (1, "loop", 0, [0, 0, 0]),
        (3, "mirror", 0, [0, 1, 2, 2, 1, 0, 0, 1]),
        (3, "mirror", 2, [2, 2, 1, 0, 0, 1]),
        (1, "mirror", 0, [0, 0, 0]),
    ],
)
def test_orders(count: int, order: Order, start: int, expected: list[int]) -> None:
    assert frame_order(count, range(len(expected)), order, start) == expected


def test_golden_order(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "frames.json").read_text())
    assert frame_order(golden["template_frames"], range(golden["count"])) == golden["template_index"]


COUNTS = st.integers(1, 30).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count - 1)))
ORDERS = st.sampled_from(["bounce", "loop", "mirror"])


@given(COUNTS, ORDERS, st.integers(0, 200), st.integers(0, 200))
def test_order_stays_within_and_can_be_split(at: tuple[int, int], order: Order, split: int, more: int) -> None:
    count, start = at
    whole = frame_order(count, range(split + more), order, start)
    assert all(0 <= i < count for i in whole)
    parts = [frame_order(count, part, order, start) for part in (range(split), range(split, split + more))]
    assert [*parts[0], *parts[1]] == whole


@given(COUNTS.filter(lambda at: at[0] > 1))
def test_bounce_goes_step_by_step_through_all(at: tuple[int, int]) -> None:
    count, start = at
    indices = frame_order(count, range(3 * count), "bounce", start)
    assert all(abs(a - b) == 1 for a, b in itertools.pairwise(indices))
    assert set(indices) == set(range(count))


@pytest.mark.parametrize("order", ["bounce", "loop", "mirror"])
@pytest.mark.parametrize("start", [-1, 5, 99])
def test_start_outside_the_template_is_told(order: Order, start: int) -> None:
    with pytest.raises(InputError, match=f"start frame {start} is not within the template's frames 0 to 4"):
        frame_order(5, range(3), order, start)
