"""States in memory and in files are the same; they can be saved and read by any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import bitwright
from bitwright.ranks import LEAVES, Ranks, Sum, share, spread_over
from bitwright.runs.states import ChunkPlan, States, read_states

WIDTH = 5


def rows_of(plan: ChunkPlan, everything: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [everything[plan.place(number)].copy() for number in plan.numbers]


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    chunk_rows=st.integers(1, 9),
    first=st.integers(0, 5),
    resident=st.none() | st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_states_in_files_are_those_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    chunk_rows: int,
    first: int,
    resident: int | None,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("scratch")
    rng = np.random.default_rng(seed)
    everything = rng.standard_normal((rows, WIDTH), dtype=np.float32)
    chunks = -(-rows // chunk_rows)
    plan = ChunkPlan.shared(rows, chunk_rows, min(first, chunks), resident, folder)
    assert plan.numbers == tuple(range(chunks))
    states = States(plan, rows_of(plan, everything))
    kept = states.copy(below=2)
    for factor in (2, 3):
        for place, chunk in enumerate(states.chunks()):
            if factor == 3:
                np.testing.assert_array_equal(chunk.inner["inner"], chunk.hidden[:, :2] / 2 + place)
            chunk.inner["inner"] = chunk.hidden[:, :2] + np.float32(place)
            chunk.hidden *= np.float32(factor)
    states.forget_inner()
    for chunk in states.chunks():
        assert not chunk.inner
    np.testing.assert_array_equal(np.concatenate(list(states.hidden())), 6 * everything)
    np.testing.assert_array_equal(np.concatenate(list(kept.hidden())), everything[: 2 * chunk_rows])
    states.save(folder / "saved")
    again = np.concatenate(list(read_states(folder / "saved", plan, WIDTH)))
    np.testing.assert_array_equal(again, 6 * everything)
    in_files = 0 if resident is None else max(0, chunks - resident)
    assert len(list(folder.glob(f"{states._name}-*"))) == in_files
    states.delete()
    kept.delete()
    assert [path.name for path in folder.iterdir()] == ["saved"]


class OneOf(Ranks):
    """One of several ranks that talk to nobody."""

    def __init__(self, rank: int, size: int, fixed_order: bool) -> None:
        super().__init__(fixed_order)
        self.rank = rank
        self.size = size


@given(
    rows=st.integers(1, 200),
    first=st.integers(0, 30),
    size=st.integers(1, 9),
    fixed_order=st.booleans(),
)
def test_every_chunk_belongs_to_one_rank(
    rows: int, first: int, size: int, fixed_order: bool
) -> None:
    chunks = -(-rows // 7)
    found: list[int] = []
    leaves: list[int] = []
    for rank in range(size):
        with pytest.MonkeyPatch.context() as patch:
            ranks = OneOf(rank, size, fixed_order)
            patch.setattr("bitwright.runs.states.current", lambda ranks=ranks: ranks)
            plan = ChunkPlan.shared(rows, 7, min(first, chunks))
        assert list(plan.numbers) == sorted(plan.numbers)
        found += plan.numbers
        leaves += {plan.leaf(number) for number in plan.numbers}
    assert sorted(found) == list(range(chunks))
    if fixed_order:  # a leaf is never cut in two, whatever the number of ranks
        assert len(leaves) == len(set(leaves)) <= 2 * LEAVES


@given(count=st.integers(0, 100), size=st.integers(1, 12), unit=st.integers(1, 16))
def test_shares_cover_everything_once(count: int, size: int, unit: int) -> None:
    parts = [share(count, rank, size, unit) for rank in range(size)]
    assert [each for part in parts for each in part] == list(range(count))
    for part in parts[:-1]:
        assert part.stop % unit == 0 or part.stop == count


@given(count=st.integers(0, 2000), size=st.integers(1, 12))
def test_what_is_computed_together_does_not_depend_on_the_number_of_ranks(
    count: int, size: int
) -> None:
    """In a fixed order; else each rank has one piece, and whole registers of rows."""
    alone, free = Ranks(fixed_order=True), [OneOf(rank, size, False) for rank in range(size)]
    fixed = [OneOf(rank, size, True) for rank in range(size)]
    for pieces in (
        lambda ranks: ranks.rows(count),
        lambda ranks: [slice(leaf.start, leaf.stop) for leaf in ranks.leaves(count)],
    ):
        assert [piece for ranks in fixed for piece in pieces(ranks)] == pieces(alone)
        for parts in (fixed, free):
            found = [
                place for ranks in parts for piece in pieces(ranks) for place in numbers(piece)
            ]
            assert found == list(range(count))
    assert all(len(ranks.rows(count)) <= 1 == len(ranks.leaves(count)) for ranks in free)
    assert all(rows.start % 16 == 0 for ranks in free for rows in ranks.rows(count))


def numbers(piece: slice) -> range:
    return range(piece.start, piece.stop)


@given(chunks=st.integers(1, 40), first_part=st.integers(0, 40), fixed_order=st.booleans())
def test_sums_hold_few_arrays(chunks: int, first_part: int, fixed_order: bool) -> None:
    with spread_over(fixed_order=fixed_order) as ranks:
        plan = ChunkPlan.shared(chunks, 1, min(first_part, chunks))
        parts = plan.numbers[: plan.first_part], plan.numbers[plan.first_part :]
        for numbers in filter(None, parts):
            total = Sum((1,), np.int64)
            for number in numbers:
                total.place(plan.leaf(number))[0] += number
                assert len(total._nodes) <= ranks.most_summands(len(numbers))
            assert total.total() == sum(numbers)


def test_alone_there_is_one_rank() -> None:
    with spread_over(fixed_order=True) as ranks:
        assert (ranks.rank, ranks.size, ranks.fixed_order) == (0, 1, True)
        assert ranks.total([2.5, 1]) == 3.5
        assert ranks.on_first(lambda: 3) == 3
    assert not bitwright.ranks.current().fixed_order


def test_short_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "saved").write_bytes(bytes(4 * WIDTH))
    plan = ChunkPlan(2, 2, 0, (0,))
    with pytest.raises(bitwright.OutputError, match="saved: cannot be read: is shorter"):
        list(read_states(tmp_path / "saved", plan, WIDTH))
