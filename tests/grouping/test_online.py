"""The streaming grouper against its promises: in time, in size, every prompt once."""

import itertools

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
        joined[number] = stream.add(x[number], now)
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
    for value in (0.0, np.nan, np.inf):
        stream.add(np.full(3, value), 0.0)
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
    stream.add(np.ones(3), 5.0)
    with pytest.raises(ConfigurationError, match="backwards"):
        stream.add(np.ones(3), 4.0)
    with pytest.raises(DataError, match="width"):
        stream.add(np.ones(4), 5.0)
    with pytest.raises(DataError):
        stream.add(np.ones((2, 2)), 5.0)
