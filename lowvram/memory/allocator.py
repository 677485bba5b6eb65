"""The caching allocator of CUDA in numbers: what it reserves for a sequence of allocations.

Follows torch's `c10/cuda/CUDACachingAllocator.cpp` with its defaults: sizes are rounded to 512
bytes; up to 1 MiB comes from segments of 2 MiB, less than 10 MiB from segments of 20 MiB, more from
segments of its own in steps of 2 MiB; the smallest free block that fits is taken and split; freed
neighbours merge; before memory runs out, segments that are wholly free go back to the driver.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

_ROUND = 512
_SMALL, _SMALL_SEGMENT = 1 << 20, 2 << 20
_LARGE, _LARGE_SEGMENT = 10 << 20, 20 << 20
_STEP = 2 << 20


@dataclass(frozen=True)
class Peaks:
    """Bytes, both as `torch.cuda.max_memory_allocated` and `…_reserved` report them."""

    allocated: int
    reserved: int


def peaks(events: Iterable[tuple[int, int]], cap: int | None = None) -> Peaks | None:
    """The peaks of a sequence of allocations.

    Args:
        events: a key with the bytes allocated for it, or with a negative number when it is freed.
        cap: of the bytes reserved, as `set_per_process_memory_fraction` sets it.

    Returns:
        None where the cap makes an allocation fail.
    """
    pools = {True: _Pool(), False: _Pool()}
    lent: dict[int, tuple[_Block, bool]] = {}
    allocated = reserved = 0
    most = Peaks(0, 0)
    for key, size in events:
        if size <= 0:
            if key in lent:
                block, small = lent.pop(key)
                allocated -= block.size
                pools[small].give_back(block)
            continue
        size = -(-size // _ROUND) * _ROUND
        small = size <= _SMALL
        found = pools[small].take(size, small)
        if found is None:
            new = _segment_size(size)
            if cap is not None and reserved + new > cap:
                reserved -= sum(pool.release() for pool in pools.values())
                if reserved + new > cap:
                    return None
            reserved += new
            found = pools[small].split(_Block(new, new), size, small)
        lent[key] = found, small
        allocated += found.size
        most = Peaks(max(most.allocated, allocated), max(most.reserved, reserved))
    return most


@dataclass(eq=False)
class _Block:
    size: int
    segment: int  # bytes of the whole segment
    free: bool = False
    before: "_Block | None" = None
    after: "_Block | None" = None


@dataclass
class _Pool:
    """Free blocks, by size."""

    blocks: list[tuple[int, int, _Block]] = field(default_factory=list)
    _count: int = 0

    def take(self, size: int, small: bool) -> _Block | None:
        """The smallest free block that holds so much, without what is left over."""
        at = bisect_left(self.blocks, (size,))
        if at == len(self.blocks):
            return None
        return self.split(self.blocks.pop(at)[2], size, small)

    def split(self, block: _Block, size: int, small: bool) -> _Block:
        """Leave what is over to others, where it is worth it."""
        block.free = False
        rest = block.size - size
        if rest >= _ROUND if small else rest > _SMALL:
            left = _Block(rest, block.segment, before=block, after=block.after)
            if block.after is not None:
                block.after.before = left
            block.after, block.size = left, size
            self._keep(left)
        return block

    def give_back(self, block: _Block) -> None:
        """Free a block, merged with its neighbours."""
        for other in (block.before, block.after):
            if other is not None and other.free:
                self.blocks.remove(next(each for each in self.blocks if each[2] is other))
                block.size += other.size
                if other is block.before:
                    block.before = other.before
                    if block.before is not None:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after is not None:
                        block.after.before = block
        self._keep(block)

    def release(self) -> int:
        """Give segments that are wholly free back to the driver; their bytes."""
        gone = [each for each in self.blocks if each[2].size == each[2].segment]
        self.blocks = [each for each in self.blocks if each[2].size != each[2].segment]
        return sum(size for size, _, _ in gone)

    def _keep(self, block: _Block) -> None:
        block.free = True
        self._count += 1  # of two of a size the older is taken, as a stand-in for the address
        insort(self.blocks, (block.size, self._count, block))


def _segment_size(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if size < _LARGE else -(-size // _STEP) * _STEP
