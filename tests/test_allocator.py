"""The caching allocator in numbers: the rules of torch's own, one by one, and what holds always."""

from hypothesis import given
from hypothesis import strategies as st

from lowvram.memory.allocator import Peaks, peaks

MIB = 1 << 20


def test_sizes_are_rounded_and_come_from_segments() -> None:
    assert peaks([(1, 1)]) == Peaks(512, 2 * MIB)
    assert peaks([(1, MIB)]) == Peaks(MIB, 2 * MIB)
    assert peaks([(1, MIB + 1)]) == Peaks(MIB + 512, 20 * MIB)
    assert peaks([(1, 10 * MIB)]) == Peaks(10 * MIB, 10 * MIB)
    assert peaks([(1, 11 * MIB)]) == Peaks(12 * MIB, 12 * MIB)  # a rest of 1 MiB is not split off


def test_a_segment_serves_several() -> None:
    assert peaks([(n, 4 * MIB) for n in range(5)]) == Peaks(20 * MIB, 20 * MIB)
    assert peaks([(n, 4 * MIB) for n in range(6)]) == Peaks(24 * MIB, 40 * MIB)
    # of 20 MiB nine are left, a rest of a large block, and small ones do not come from it
    assert peaks([(1, 9 * MIB), (2, 9 * MIB), (3, MIB)]) == Peaks(19 * MIB, 22 * MIB)


def test_freed_memory_is_used_again_and_neighbours_merge() -> None:
    apart = [(1, 9 * MIB), (2, 9 * MIB), (1, -1), (2, -1), (3, 18 * MIB)]
    assert peaks(apart) == Peaks(18 * MIB, 20 * MIB)
    # the smallest that fits: 30 MiB are taken before 40, and 25 of them split
    assert peaks(
        [(1, 40 * MIB), (2, 30 * MIB), (1, -1), (2, -1), (3, 25 * MIB), (4, 40 * MIB)]
    ) == Peaks(70 * MIB, 70 * MIB)


def test_under_a_cap_free_segments_go_back_first() -> None:
    events = [(1, 30 * MIB), (1, -1), (2, 40 * MIB)]
    assert peaks(events) == Peaks(40 * MIB, 70 * MIB)
    assert peaks(events, cap=64 * MIB) == Peaks(40 * MIB, 40 * MIB)
    assert peaks(events, cap=39 * MIB) is None
    # what is split is in use, and stays
    kept = [(1, 30 * MIB), (1, -1), (3, 12 * MIB), (2, 40 * MIB)]
    assert peaks(kept, cap=64 * MIB) is None


EVENTS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 50 * MIB), st.booleans()), max_size=60
)


@given(EVENTS)
def test_what_holds_always(drawn: list[tuple[int, int, bool]]) -> None:
    events, there = [], {}
    for key, size, frees in drawn:
        if key in there:
            if frees:
                events.append((key, -there.pop(key)))
        else:
            there[key] = size
            events.append((key, size))
    found = peaks(events)
    assert found is not None
    assert found.allocated <= found.reserved
    assert found == peaks(events, cap=found.reserved)
    # once all is free, the same again takes nothing new
    again = events + [(key, -size) for key, size in there.items()]
    once, twice = peaks(again), peaks(again + again)
    assert once is not None and twice is not None and twice.allocated == once.allocated
