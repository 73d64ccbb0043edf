"""Huffman's code for indices of few bits, with true bytes: the third stage of deep compression.

Han et al., Deep Compression (https://arxiv.org/abs/1510.00149), section 4; Huffman, A Method for the Construction of
Minimum-Redundancy Codes (1952). The code is canonical (Schwartz and Kallick 1964), so that the lengths of the codes are
all that has to be stored of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fusion.errors import GateError

BLOCK = 1024
"""Symbols whose bits are counted together. A decoder reads all blocks side by side, which numpy can do at once; what
that costs is two bytes a block, .016 bits a symbol."""

_WINDOW = 8
"""Bytes read at once: 57 bits from any bit on. A code of 58 bits needs more than 10^11 symbols."""


@dataclass(frozen=True)
class Huffman:
    """Symbols in Huffman's code.

    Attributes:
        stream: the codes one after the other, highest bit first, uint8; the last byte is filled with zeros.
        lengths: bits of the code of each symbol from 0 to the largest, uint8; 0 for one that does not occur. Where only
            one symbol occurs, it is the last, and needs no bits at all.
        blocks: bits of each `BLOCK` symbols, uint16: 1024 codes of 57 bits still fit.
        count: how many symbols there are.
    """

    stream: np.ndarray
    lengths: np.ndarray
    blocks: np.ndarray
    count: int

    @classmethod
    def encode(cls, symbols: np.ndarray) -> Huffman:
        """The code of symbols uint8 `[n]` that needs the fewest bits: between their entropy and 1 bit a symbol more."""
        lengths = code_lengths(np.bincount(symbols))
        if not lengths.any():
            return cls(np.zeros(0, np.uint8), lengths, np.zeros(0, np.uint16), len(symbols))
        codes = _canonical(lengths)
        sizes = lengths[symbols]
        ends = np.cumsum(sizes, dtype=np.int64)
        bits = np.zeros(ends[-1], np.uint8)
        for place in range(int(lengths.max())):
            have = sizes > place
            chosen = symbols[have]
            shift = (lengths[chosen] - 1 - place).astype(np.uint64)
            bits[ends[have] - sizes[have] + place] = (codes[chosen] >> shift) & np.uint64(1)
        blocks = np.add.reduceat(sizes, np.arange(0, len(symbols), BLOCK), dtype=np.uint16)
        return cls(np.packbits(bits), lengths, blocks, len(symbols))

    def decode(self) -> np.ndarray:
        """The symbols, uint8 `[count]`.

        Raises GateError where the arrays are no such code, as those of a damaged file.
        """
        self._check()
        if not self.lengths.any():
            return np.full(self.count, max(len(self.lengths) - 1, 0), np.uint8)
        table = _Table(self.lengths)
        padded = np.concatenate([self.stream, np.zeros(_WINDOW, np.uint8)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)
        ends = np.cumsum(self.blocks, dtype=np.int64)
        places = ends - self.blocks
        symbols = np.zeros((len(self.blocks), BLOCK), np.uint8)
        for number in range(min(BLOCK, self.count)):
            # The last block may end sooner than the others; it then reads its own end again, which is cut off below.
            bytes_read = np.ascontiguousarray(windows[places >> 3]).view(">u8")[:, 0].astype(np.uint64)
            symbols[:, number], sizes = table.read(bytes_read << (places & 7).astype(np.uint64))
            places = np.minimum(places + sizes, ends)
        return symbols.reshape(-1)[: self.count]

    def arrays(self) -> dict[str, np.ndarray]:
        """What has to be stored."""
        count = np.array([self.count], np.int64)
        return {"stream": self.stream, "lengths": self.lengths, "blocks": self.blocks, "count": count}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Huffman:
        """Takes back what `arrays` gave."""
        return cls(arrays["stream"], arrays["lengths"], arrays["blocks"], int(arrays["count"][0]))

    @property
    def bytes(self) -> int:
        """Of the stream, the lengths of the codes and the bits of the blocks."""
        return sum(array.nbytes for array in self.arrays().values())

    def _check(self) -> None:
        coded = self.lengths.any()
        blocks = -(-self.count // BLOCK) if coded else 0
        bits = int(self.blocks.sum(dtype=np.int64))
        whole = sum(2 ** (64 - int(length)) for length in self.lengths if length) in (2**64, 0)
        if not whole or self.count < 0 or len(self.blocks) != blocks or len(self.stream) != -(-bits // 8):
            raise GateError(
                f"Huffman's code must be complete; received {self.count} symbols of {len(self.lengths)} kinds in "
                f"{len(self.stream)} bytes, which do not fit together. Write the file again."
            )


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Bits of each symbol's code, uint8 `[K]`, for its counts `[K]`; all 0 where fewer than two symbols occur."""
    lengths = np.zeros(len(counts), np.uint8)
    # Equal counts are decided by the number, so that equal data give equal bytes.
    heap = [(int(count), number, [number]) for number, count in enumerate(counts) if count]
    heapq.heapify(heap)
    while len(heap) > 1:
        (first, number, some), (second, _, others) = heapq.heappop(heap), heapq.heappop(heap)
        joined = some + others
        lengths[joined] += 1
        heapq.heappush(heap, (first + second, number, joined))
    return lengths


def entropy(counts: np.ndarray) -> float:
    """Shannon's entropy of symbols with these counts `[K]`, in bits a symbol; 0 for none."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum())


def _in_order(lengths: np.ndarray) -> np.ndarray:
    """The symbols that have a code, from the shortest code to the longest."""
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] > 0]


def _canonical(lengths: np.ndarray) -> np.ndarray:
    """The codes uint64 `[K]`: they count upwards in the order of symbols, and are shifted where they grow longer."""
    codes = np.zeros(len(lengths), np.uint64)
    code, last = 0, 0
    for symbol in _in_order(lengths):
        code <<= int(lengths[symbol]) - last
        last = int(lengths[symbol])
        codes[symbol] = code
        code += 1
    return codes


class _Table:
    """Finds the code at the head of 64 bits: canonical codes, moved to the left end, are sorted like their symbols."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.symbols = _in_order(lengths)
        self.sizes = lengths[self.symbols].astype(np.int64)
        self.first = _canonical(lengths)[self.symbols] << (64 - self.sizes).astype(np.uint64)

    def read(self, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads uint64 `[m]` -> the symbol that each begins with, and the bits of its code."""
        found = np.searchsorted(self.first, heads, side="right") - 1
        return self.symbols[found], self.sizes[found]
