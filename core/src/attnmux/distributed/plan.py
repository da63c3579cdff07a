"""Who holds which tokens and which heads: computed on every rank from numbers that every rank has, nothing is exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from attnmux.errors import UnsupportedRequestError

__all__ = ["HeadPlan", "SeqPlan", "split_evenly"]

Range = tuple[int, int]


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of `parts` consecutive parts of `total`; they differ by at most one, larger ones first."""
    size, larger = divmod(total, parts)
    return tuple(size + (part < larger) for part in range(parts))


@dataclass(frozen=True)
class SeqPlan:
    """How a sequence lies on the ranks: consecutive shards in rank order, each possibly followed by rows of padding.

    Attributes:
        lengths: Tokens of each rank, without padding; 0 is an empty shard.
        rows: Rows of each rank's tensors, padding included.

    Raises:
        UnsupportedRequestError: Numbers that fit no sequence.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.rows) or not self.lengths:
            raise UnsupportedRequestError(
                f"a plan needs lengths and rows of every rank, got {self.lengths}, {self.rows}"
            )
        if any(not 0 <= length <= rows for length, rows in zip(self.lengths, self.rows, strict=True)):
            raise UnsupportedRequestError(
                f"lengths must be in [0, rows] on every rank, got {self.lengths}, {self.rows}"
            )

    @classmethod
    def balanced(cls, length: int, size: int) -> SeqPlan:
        """Return the plan without padding: `length` tokens on `size` ranks, shards differ by at most one token."""
        if length < 1 or size < 1:
            raise UnsupportedRequestError(f"a plan needs length >= 1 and size >= 1, got {length} and {size}")
        lengths = split_evenly(length, size)
        return cls(lengths, lengths)

    @classmethod
    def padded(cls, length: int, rows: int, size: int) -> SeqPlan:
        """Return the plan of `size` shards of `rows` rows each, of which the first `length` rows overall are tokens."""
        if not 1 <= length <= rows * size:
            raise UnsupportedRequestError(
                f"original_seq_len={length} must be in [1, {rows * size}]: {size} ranks hold {rows} rows each"
            )
        return cls(tuple(min(max(length - rank * rows, 0), rows) for rank in range(size)), (rows,) * size)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    def part(self, first: int, last: int) -> SeqPlan:
        """Return the plan of the ranks from `first` to the one before `last` alone."""
        return SeqPlan(self.lengths[first:last], self.rows[first:last])

    def range_of(self, rank: int) -> Range:
        """Return the first token of a rank and the one after its last."""
        first = sum(self.lengths[:rank])
        return first, first + self.lengths[rank]


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each rank attends with, as [first, last) ranges.

    Every rank has whole groups of query heads, or heads of a single group: a GQA kernel can run either. With more ranks
    than key heads a key head goes to several ranks; with more ranks than query heads some ranks get none.

    Attributes:
        q: Query heads of each rank.
        kv: Key and value heads of each rank.
    """

    q: tuple[Range, ...]
    kv: tuple[Range, ...]

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, size: int) -> HeadPlan:
        """Return the plan for `num_heads` query and `num_kv_heads` key heads, a divisor, on `size` ranks."""
        group = num_heads // num_kv_heads
        if num_kv_heads >= size:
            kv = _ranges(split_evenly(num_kv_heads, size))
            return cls(tuple((first * group, last * group) for first, last in kv), kv)
        q: list[Range] = []
        kv_ranges: list[Range] = []
        for head, ranks in enumerate(split_evenly(size, num_kv_heads)):
            for first, last in _ranges(split_evenly(group, ranks)):
                q.append((head * group + first, head * group + last))
                kv_ranges.append((head, head + 1) if last > first else (head, head))
        return cls(tuple(q), tuple(kv_ranges))

    def groups(self, count: int) -> tuple[HeadPlan, ...]:
        """Return each rank's heads in `count` groups of consecutive ones, in which key heads stay together with their queries."""
        if count == 1:
            return (self,)
        q: list[list[Range]] = [[] for _ in range(count)]
        kv: list[list[Range]] = [[] for _ in range(count)]
        for (q_first, q_last), (kv_first, kv_last) in zip(self.q, self.kv, strict=True):
            width = (q_last - q_first) // max(kv_last - kv_first, 1)
            for number, (first, last) in enumerate(_ranges(split_evenly(kv_last - kv_first, count))):
                q[number].append((q_first + first * width, q_first + last * width))
                kv[number].append((kv_first + first, kv_first + last))
        return tuple(HeadPlan(tuple(of_q), tuple(of_kv)) for of_q, of_kv in zip(q, kv, strict=True))


def _ranges(sizes: tuple[int, ...]) -> tuple[Range, ...]:
    ends = tuple(accumulate(sizes))
    return tuple((end - size, end) for size, end in zip(sizes, ends, strict=True))
