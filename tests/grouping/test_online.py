"""The streaming grouper against its promises: in time, in size, every prompt once."""

import itertools
import sys
import threading
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.errors import ConfigurationError, DataError
from sage.grouping.groups import worst_similarity
from sage.grouping.online import StreamingGrouper, replay


def rows(n, seed=0, centres=5):
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(centres, 6))[random.integers(centres, size=n)] + 0.3 * random.normal(size=(n, 6))
    ).astype(np.float32)


@settings(deadline=None, max_examples=200)
@given(
    n=st.integers(0, 40),
    gaps=st.floats(0, 3),
    threshold=st.floats(-1, 1),
    max_size=st.integers(1, 6),
    wait=st.floats(0, 10),
    window=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_every_prompt_goes_once_in_time_and_with_its_like(n, gaps, threshold, max_size, wait, window, seed):
    x = rows(n, seed)
    stream = StreamingGrouper(threshold, max_size, wait=wait, window=window)
    arrival, joined, went, groups = {}, {}, {}, []
    now = 0.0
    for number in range(n):
        now += gaps * (number % 3)
        while stream.deadline is not None and stream.deadline <= now:  # what an event loop does
            due = stream.deadline
            for members in stream.release(due):
                groups.append(members)
                went |= dict.fromkeys(members, due)
        arrival[number] = now
        joined[number] = stream.add(number, x[number], now)
        assert stream.waiting <= window
        for members in stream.release(now):
            groups.append(members)
            went |= dict.fromkeys(members, now)
    while stream.deadline is not None:
        due = stream.deadline
        for members in stream.release(due):
            groups.append(members)
            went |= dict.fromkeys(members, due)
    assert sorted(itertools.chain(*groups)) == list(range(n))
    assert all(went[number] <= arrival[number] + wait for number in range(n))
    assert all(len({joined[member] for member in members}) == 1 for members in groups)
    assert all(len(members) <= max_size for members in groups)
    assert all(worst >= threshold - 1e-5 for worst in worst_similarity(x, groups))
    assert stream.saving == pytest.approx(1 - len(groups) / n if n else 0)


def test_a_longer_window_comes_nearer_to_the_whole_set():
    x = rows(300, centres=40)
    savings = []
    for window in (4, 32, 300):
        groups, streamed, whole = replay(x, range(300), 0.7, 6, wait=1000, window=window)
        assert sorted(itertools.chain(*groups)) == list(range(300))
        savings.append(streamed)
    assert savings[0] < savings[1] < savings[2] <= whole + 0.02
    assert savings[2] > 0.8 * whole


def test_a_prompt_without_a_direction_is_alone_and_goes_at_once():
    stream = StreamingGrouper(-1.0, 9, wait=10, window=9)
    for number, value in enumerate((0.0, np.nan, np.inf)):
        stream.add(number, np.full(3, value), 0.0)
    assert stream.release(0.0) == [[0], [1], [2]]


def test_what_cannot_be_is_refused():
    for threshold, max_size, wait, window in [
        (2, 1, 1, 1),
        (0, 0, 1, 1),
        (0, 1, -1, 1),
        (0, 1, 1, 0),
        (0, 1, np.nan, 1),
    ]:
        with pytest.raises(ConfigurationError):
            StreamingGrouper(threshold, max_size, wait=wait, window=window)
    stream = StreamingGrouper(0.5, 3, wait=1, window=3)
    stream.add("a", np.ones(3), 5.0)
    with pytest.raises(DataError, match="width 4, but earlier ones have width 3"):
        stream.add("b", np.ones(4), 5.0)
    with pytest.raises(DataError):
        stream.add("b", np.ones((2, 2)), 5.0)
    with pytest.raises(DataError, match="'a' is waiting already"):
        stream.add("a", np.ones(3), 5.0)
    for time in (None, datetime.now(UTC), "5", np.nan, np.inf):
        for call in (lambda time=time: stream.add("b", np.ones(3), time), lambda time=time: stream.release(time)):
            with pytest.raises(ConfigurationError, match="finite number of seconds"):
                call()
    assert stream.close() == [["a"]], "a prompt that was refused was added"


def test_copies_never_share_and_a_near_duplicate_is_what_it_is_in_the_batch():
    x = rows(6)
    x[3] = 2 * x[0]
    for near_duplicate in (0.999, 1.0):
        stream = StreamingGrouper(-1.0, 6, wait=1, window=9, near_duplicate=near_duplicate)
        for number, row in enumerate(x):
            stream.add(number, row, 0.0)
        groups = stream.close()
        assert len(groups) == 2 and not any({0, 3} <= set(members) for members in groups)
    stream = StreamingGrouper(-1.0, 6, wait=1, window=9, near_duplicate=np.inf)
    for number, row in enumerate(x):
        stream.add(number, row, 0.0)
    assert stream.close() == [[0, 1, 2, 3, 4, 5]]
    default = StreamingGrouper(-1.0, 6, wait=1, window=9)
    for number in range(4):
        default.add(number, np.ones(3), 0.0)
    assert default.close() == [[0], [1], [2], [3]]


def test_a_full_group_is_due_at_once():
    stream = StreamingGrouper(-1.0, 2, wait=10, window=9)
    stream.add("a", np.array([1.0, 0]), 3.0)
    assert stream.deadline == 13.0
    stream.add("b", np.array([0, 1.0]), 4.0)
    stream.add("c", np.array([-1.0, 0]), 5.0)
    assert stream.deadline == 5.0
    assert stream.release(5.0) == [["a", "b"]]
    assert stream.deadline == 15.0
    assert stream.release(15.0) == [["c"]] and stream.deadline is None


def test_a_cancelled_prompt_goes_nowhere_and_makes_nobody_hurry():
    stream = StreamingGrouper(-1.0, 3, wait=10, window=9)
    x = np.eye(3)
    for number in range(2):
        stream.add(number, x[number], float(number))
    assert stream.deadline == 10.0
    assert stream.cancel(0) and not stream.cancel(0) and not stream.cancel("unknown")
    assert stream.deadline == 11.0 and stream.waiting == 1
    stream.add(0, x[0], 2.0)
    stream.add(2, x[2], 2.0)  # full, not handed out
    assert stream.cancel(2)
    assert stream.release(2.0) == [[1, 0]] and not stream.cancel(1)
    assert (stream.prompts, stream.groups, stream.saving) == (2, 1, 0.5)
    stream.add(5, x[0], 3.0)
    assert stream.cancel(5) and stream.deadline is None and stream.close() == [] and stream.groups == 1


def test_threads_that_read_the_clock_out_of_order_lose_nothing():
    random = np.random.default_rng(0)
    x = random.normal(size=(30, 32))[random.integers(30, size=2000)] + 0.2 * random.normal(size=(2000, 32))
    stream = StreamingGrouper[int](0.7, 6, wait=1e9, window=60)
    faults: list[BaseException] = []
    done = threading.Event()
    groups: list[list[int]] = []

    def add(part: int) -> None:
        try:
            for number in range(part, len(x), 2):
                stream.add(number, x[number], float(-part * number))
        except BaseException as error:
            faults.append(error)

    def release() -> None:
        while not done.is_set():
            assert stream.deadline is None or stream.waiting >= 0
            groups.extend(stream.release(0.0))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        adders = [threading.Thread(target=add, args=(part,)) for part in range(2)]
        releaser = threading.Thread(target=release)
        for thread in (releaser, *adders):
            thread.start()
        for thread in adders:
            thread.join()
        done.set()
        releaser.join()
    finally:
        sys.setswitchinterval(interval)
    groups.extend(stream.close())
    assert not faults
    assert sorted(itertools.chain(*groups)) == list(range(len(x)))
    assert all(len(members) <= 6 for members in groups)
