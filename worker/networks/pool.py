"""The memory in which ncnn computes: the same pages again and again, and hardly more of them than are in use.

ncnn's own pools keep a block of every size they were asked for. Strips ask for many sizes (layers have fewer rows at
the picture's top, more at its end, and other channels), and more than half of what was held was in nobody's use. To
give blocks back instead costs more than the computing: fresh pages made strips take twice as long. So here blobs lie
side by side in one stretch of memory, each in the lowest place where it fits.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import threading
from collections import deque
from typing import Any

try:
    import ncnn
except ImportError:  # an optional dependency: no wheel for this machine
    ncnn = None

SEGMENT_BYTES = 2**30
"""Addresses taken at a time: for strips of any picture, since no blob lies across two segments, and what is left at the
end of one is lost. Only pages that were written to are memory."""
ALIGNED_TO_BYTES = 64
READ_BEYOND_BYTES = 64
"""ncnn's kernels may read so far beyond the end of a blob."""

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_address_in = ctypes.pythonapi.PyCapsule_GetPointer
_address_in.restype = ctypes.c_void_p
_address_in.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Segment:
    """A stretch of addresses, and which of them are in use."""

    def __init__(self, size: int) -> None:
        """Raises OSError where there are no such addresses."""
        self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self._free = [(0, size)]
        """(start, end) of what is in no use, by start; no two touch."""
        self.reached = 0
        """Where the highest block ended."""

    def take(self, size: int) -> int | None:
        """Where a block begins, if one fits: the lowest such place."""
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                self.reached = max(self.reached, start + size)
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        end = start + size
        index = bisect.bisect(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def forget(self) -> None:
        """The system may have the pages that are in no use."""
        for start, end in self._free:
            first, last = -(-start // mmap.PAGESIZE), min(end, self.reached) // mmap.PAGESIZE
            if first < last:
                self._pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)
        if self._free and self._free[-1][1] >= self.reached:
            self.reached = min(self.reached, self._free[-1][0])


# Of ncnn's kinds of allocator the one that does least: nothing of it is used.
class Pool(ncnn.UnlockedPoolAllocator if ncnn is not None else object):  # type: ignore[misc]  # ncnn has no types
    """An allocator for `ncnn.Option`. It stays as long as anything that it has allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.in_use_bytes = 0
        self._segments: list[_Segment] = []
        self._in_use: dict[int, tuple[_Segment, int, int]] = {}
        # ncnn lets go of Python's own lock while it computes, and may ask from any of its threads.
        self._lock = threading.Lock()
        self._given_back: deque[int] = deque()
        self.most_held_bytes = 0
        """The most of `held_bytes`. May be set to 0, to begin anew."""

    @property
    def held_bytes(self) -> int:
        """What is in use, and what was since the last `clear`: at most so much is memory."""
        return sum(segment.reached for segment in self._segments)

    def fastMalloc(self, size: int) -> Any:
        """A capsule with the address of `size` bytes; None where there are none."""
        size = -(-(size + READ_BEYOND_BYTES) // ALIGNED_TO_BYTES) * ALIGNED_TO_BYTES
        with self._lock:
            self._take_back()
            for segment in self._segments:
                start = segment.take(size)
                if start is not None:
                    break
            else:
                try:
                    segment = _Segment(max(size, SEGMENT_BYTES))
                except OSError:
                    return None
                self._segments.append(segment)
                start = segment.take(size)
                assert start is not None
            self._in_use[segment.address + start] = segment, start, size
            _IN_USE.add(self)
            self.in_use_bytes += size
            self.most_held_bytes = max(self.most_held_bytes, self.held_bytes)
            return _new_capsule(segment.address + start, None, None)

    def fastFree(self, pointer: Any) -> None:
        self._given_back.append(_address_in(pointer, None))
        # Python may collect garbage, and ncnn's with it, in the midst of any of these methods. Who has the lock
        # meanwhile looks again after giving it up, here or when what it has allocated is freed.
        while self._given_back and self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._given_back:
            segment, start, size = self._in_use.pop(self._given_back.popleft())
            segment.give_back(start, size)
            self.in_use_bytes -= size
        if not self._in_use:
            _IN_USE.discard(self)

    def clear(self) -> None:
        """Gives what is in no use back to the system."""
        with self._lock:
            self._take_back()
            for segment in self._segments:
                segment.forget()


_IN_USE: set[Pool] = set()
