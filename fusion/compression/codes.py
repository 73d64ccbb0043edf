"""Arrays in codes of few bits: the levels that stand for their numbers, and how far off they are. Numpy alone.

Each number becomes the index of a level. Levels are evenly spaced (`uniform`), or lie where the numbers do
(`kmeans_levels`, `quantile_levels`, `normal_levels`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusion.compression.huffman import Huffman
from fusion.errors import DataError

MOST_BITS = 8
LLOYD_STEPS = 300
OCTAV_STEPS = 50
HISTOGRAM_BINS = 2048
"""Of the histogram in which a threshold is looked for, as in TensorRT."""
FEWEST_IN_BIN = 8
"""Numbers for each bin, on average; there are fewer bins where there are fewer numbers."""

_SCALES = np.geomspace(0.05, 1.0, 120)
"""Widths, as shares of the largest magnitude, among which that of normal levels is chosen."""

_SCALE_BITS = 16
"""Bits of a scale's mantissa: its product with a code of 8 bits is then exact in float32, so that a decoder cannot
differ from another one, and the scale can be read off the numbers again."""


@dataclass(frozen=True)
class Coded:
    """An array in which each number is one of few levels: number = scale · (level - zero).

    Attributes:
        packed: the index of each number's level in `bits` bits, in C order, highest bit first, uint8.
        bits: 1 to 8.
        shape: of the array.
        scale: float32 `[1]`, or `[shape[axis]]`.
        zero: the level that stands for 0, float32 `[1]` or `[shape[axis]]`.
        levels: float32 `[K]` in rising order; None where a level is its index.
        axis: the axis along which each position has a scale of its own; None for one scale in all.
    """

    packed: np.ndarray
    bits: int
    shape: tuple[int, ...]
    scale: np.ndarray
    zero: np.ndarray
    levels: np.ndarray | None = None
    axis: int | None = None

    @cached_property
    def codes(self) -> np.ndarray:
        """The indices, uint8 of the array's shape."""
        return unpack(self.packed, self.bits, math.prod(self.shape)).reshape(self.shape)

    def decode(self) -> np.ndarray:
        """The numbers, float32 of the array's shape."""
        level = self.codes.astype(np.float64) if self.levels is None else self.levels.astype(np.float64)[self.codes]
        scale, zero = (_along(part, self.axis, len(self.shape)) for part in (self.scale, self.zero))
        return (scale * (level - zero)).astype(np.float32)

    def arrays(self, huffman: bool = False) -> dict[str, np.ndarray]:
        """What has to be stored: `layout` int32 (bits, axis or -1, shape), the tables, and the codes, packed or, with
        `huffman` and where that is smaller, in Huffman's code."""
        layout = np.array([self.bits, -1 if self.axis is None else self.axis, *self.shape], np.int32)
        arrays = {"layout": layout, "scale": self.scale, "zero": self.zero}
        if self.levels is not None:
            arrays["levels"] = self.levels
        if huffman:
            entropy_coded = Huffman.encode(self.codes.reshape(-1))
            if entropy_coded.bytes < self.packed.nbytes:
                return arrays | entropy_coded.arrays()
        return {**arrays, "packed": self.packed}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Coded:
        """Takes back what `arrays` gave. Raises KeyError, ValueError or GateError where they do not fit together."""
        bits, axis, *shape = (int(number) for number in arrays["layout"])
        packed = arrays["packed"] if "packed" in arrays else pack(Huffman.from_arrays(arrays).decode(), bits)
        if not 1 <= bits <= MOST_BITS or len(packed) != math.ceil(math.prod(shape) * bits / 8):
            raise ValueError(f"{len(packed)} bytes for codes of {bits} bits in the shape {shape}")
        place = None if axis < 0 else axis
        return cls(packed, bits, tuple(shape), arrays["scale"], arrays["zero"], arrays.get("levels"), place)

    def bytes(self, huffman: bool = False) -> int:
        """Of all that has to be stored."""
        return size_of(self.arrays(huffman))


def size_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of named arrays; an `.npz` adds some 250 for each."""
    return sum(array.nbytes for array in arrays.values())


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes below 2^bits as a string of bits, uint8 `[ceil(n · bits / 8)]`."""
    each = np.unpackbits(codes.astype(np.uint8).reshape(-1, 1), axis=1)
    return np.packbits(each[:, 8 - bits :])


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of what `pack` made, uint8 `[count]`."""
    each = np.zeros((count, 8), np.uint8)
    each[:, 8 - bits :] = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.packbits(each, axis=1)[:, 0]


# ---- evenly spaced levels ------------------------------------------------------------------------------------


def uniform(
    array: np.ndarray,
    bits: int,
    axis: int | None = None,
    symmetric: bool = True,
    limit: np.ndarray | None = None,
) -> Coded:
    """Evenly spaced levels, of which one is 0. No number within the range is off by more than scale / 2.

    Jacob et al., https://arxiv.org/abs/1712.05877, equation 1; symmetric as in its restricted range for weights.

    Args:
        array: finite numbers.
        bits: 2 to 8.
        axis: along which each position has a range of its own; None for one range in all.
        symmetric: 2^bits - 1 levels from -limit to limit; otherwise 2^bits from the smallest number (or 0) to the
            largest (or 0), where `zero` is moved to a level.
        limit: magnitudes `[1]` or `[shape[axis]]` beyond which numbers are cut, for symmetric levels; the largest
            ones where it is None.

    Raises:
        DataError: a number is NaN or infinite.
        ValueError: `bits` is out of range, or a `limit` is given for levels that are not symmetric.
    """
    rows = _grouped(_finite(array), axis)
    steps = 2**bits - (2 if symmetric else 1)
    if not 2 <= bits <= MOST_BITS or (limit is not None and not symmetric):
        raise ValueError(f"uniform takes 2 to 8 bits, and limits where it is symmetric; received {bits}, {limit}.")
    if symmetric:
        high = np.abs(rows).max(axis=1, initial=0.0) if limit is None else np.asarray(limit, np.float64)
        low = -high
    else:
        low, high = rows.min(axis=1, initial=0.0), rows.max(axis=1, initial=0.0)
    scale = _short((high - low) / steps)
    usable = np.where(scale > 0, scale, 1.0)
    zero = np.full(1, steps / 2) if symmetric else np.rint(-low / usable)
    codes = np.clip(np.rint(rows / usable[:, None]) + zero[:, None], 0, steps)
    return _coded(array.shape, axis, codes, bits, scale, zero)


def error_bound(array: np.ndarray, coded: Coded) -> float:
    """What no number of an array in symmetric uniform levels is off by more than: half a step where it lies between the
    levels, its distance to the last one beyond them."""
    scale, zero = coded.scale.astype(np.float64), coded.zero.astype(np.float64)
    beyond = np.abs(_grouped(array, coded.axis)).max(axis=1, initial=0.0) - scale * zero
    return float(np.maximum(scale / 2, beyond).max(initial=0.0))


def squared_error(array: np.ndarray, coded: Coded) -> float:
    """The mean squared difference between an array and what its code stands for; 0 for an empty one."""
    difference = array.astype(np.float64) - coded.decode()
    return float(np.square(difference).mean()) if difference.size else 0.0


def mse_limit(array: np.ndarray, bits: int, axis: int | None = None) -> np.ndarray:
    """Where cutting costs symmetric uniform levels the least expected squared error, float64 `[1]` or `[shape[axis]]`.

    The fixed point of OCTAV (Sakr et al., https://arxiv.org/abs/2206.06501, equation 7), which takes rounding for
    noise of variance scale² / 12. Where that is too rough, so that nothing is won, it is the largest magnitude.
    """
    magnitudes = np.abs(_grouped(_finite(array), axis))
    largest = magnitudes.max(axis=1, initial=0.0)
    noise = 1 / (12 * (2 ** (bits - 1) - 1) ** 2)
    limit = magnitudes.sum(axis=1) / np.maximum((magnitudes > 0).sum(axis=1), 1)
    for _ in range(OCTAV_STEPS):
        beyond = magnitudes > limit[:, None]
        within = ((magnitudes > 0) & ~beyond).sum(axis=1)
        moved = (magnitudes * beyond).sum(axis=1) / np.maximum(noise * within + beyond.sum(axis=1), 1e-300)
        moved = np.where(beyond.any(axis=1), moved, limit)
        if np.allclose(moved, limit, rtol=1e-6, atol=0):
            break
        limit = moved

    def errors(at: np.ndarray) -> np.ndarray:
        decoded = uniform(array, bits, axis, limit=at).decode()
        return np.square(_grouped(array.astype(np.float64) - decoded, axis)).sum(axis=1)

    return np.where(errors(limit) < errors(largest), limit, largest)


def kl_limit(array: np.ndarray, bits: int, axis: int | None = None) -> np.ndarray:
    """Where cutting changes the distribution of magnitudes least, float64 `[1]` or `[shape[axis]]`.

    TensorRT's entropy calibration (Migacz, 8-bit Inference with TensorRT, GTC 2017): the threshold with the smallest
    Kullback-Leibler divergence between the histogram up to it, which has all beyond it in its last bin, and what is
    left of that histogram in 2^(bits - 1) steps; at least a 16th of the range is kept. A histogram needs thousands of
    numbers, so that with an `axis` all positions share it, each as a share of its largest magnitude.
    """
    magnitudes = np.abs(_grouped(_finite(array), axis))
    largest = magnitudes.max(axis=1, initial=0.0)
    shares = magnitudes / np.where(largest > 0, largest, 1.0)[:, None]
    shares, steps = shares[shares > 0], 2 ** (bits - 1)
    bins = min(HISTOGRAM_BINS, len(shares) // FEWEST_IN_BIN)
    if bins <= steps:
        return largest  # too few numbers to know a distribution by
    counts = np.histogram(shares, bins, (0.0, 1.0))[0].astype(np.float64)
    candidates = np.arange(max(steps, bins // 16), bins + 1)
    best = candidates[int(np.argmin([_divergence(counts, count, steps) for count in candidates]))]
    return largest * best / bins


def _divergence(counts: np.ndarray, bins: int, steps: int) -> float:
    """KL(P || Q) in nats; what Q lacks counts as 10^-4, as other implementations smooth it."""
    kept = counts[:bins]
    reference = kept.copy()
    reference[-1] += counts[bins:].sum()
    there = reference > 0
    step = np.arange(bins) * steps // bins
    coarse = (np.bincount(step, kept) / np.maximum(np.bincount(step, there), 1))[step][there]
    p, q = reference[there] / reference.sum(), coarse / max(coarse.sum(), 1.0)
    return float((p * np.log(p / np.maximum(q, 1e-4))).sum())


LIMITS = {"mse": mse_limit, "kl": kl_limit}


# ---- levels where the numbers are ----------------------------------------------------------------------------


def codebook(array: np.ndarray, levels: np.ndarray, scale: np.ndarray | None = None, axis: int | None = None) -> Coded:
    """Each number by the nearest of given levels.

    Args:
        array: finite numbers.
        levels: up to 256, in rising order.
        scale: what the levels are multiplied by, `[1]` or `[shape[axis]]`; 1 where it is None.
        axis: along which each position has a scale of its own.
    """
    rows = _grouped(_finite(array), axis)
    scale = np.ones(1) if scale is None else np.asarray(scale, np.float64)
    levels = np.asarray(levels, np.float32)
    middles = _middles(levels.astype(np.float64))
    codes = np.searchsorted(middles, rows / np.where(scale > 0, scale, 1.0)[:, None], side="right")
    return _coded(array.shape, axis, codes, _bits_for(len(levels) - 1), scale, np.zeros(1), levels)


def kmeans_levels(array: np.ndarray, bits: int) -> np.ndarray:
    """Up to 2^bits levels, float32, each the mean of the numbers nearest to it: k-means by Lloyd's algorithm.

    Lloyd, Least Squares Quantization in PCM (1982). In one dimension a cluster is a piece of the sorted numbers, so
    that its mean is a difference of two cumulative sums. It starts from evenly spaced levels (which Han et al. 2016
    found best), from quantiles, and from the cube root of the density (Panter and Dite 1951, optimal for many levels);
    the best end counts. Zeros of a pruned array stay zeros.
    """
    return _fitted(array, bits, _kmeans)


def quantile_levels(array: np.ndarray, bits: int) -> np.ndarray:
    """2^bits levels, float32, each the mean of an equal share of the sorted numbers: the equalised histogram. Zeros of
    a pruned array stay zeros."""
    return _fitted(array, bits, lambda numbers, count: numbers.equal_shares(count))


def normal_levels(bits: int) -> np.ndarray:
    """2^bits levels from -1 to 1, float32: quantiles of the normal distribution, with an exact 0.

    NF4 of QLoRA (Dettmers et al., https://arxiv.org/abs/2305.14314, equation 4) for 4 bits, and the same for others:
    one level more for positive numbers than for negative ones.
    """
    half = 2 ** (bits - 1)
    edge = 1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    inverse = np.vectorize(statistics.NormalDist().inv_cdf)
    positive, negative = (inverse(np.linspace(edge, 0.5, n)[:-1]) for n in (half + 1, half))
    return (np.sort(np.concatenate([positive, [0.0], -negative])) / positive[0]).astype(np.float32)


def fitted_scale(array: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The width, float64 `[1]`, by which levels from -1 to 1 have the least squared error, out of 120 up to the largest
    magnitude: a few numbers far out would otherwise take the levels away from all others."""
    numbers = _Sorted(array)
    widths = _SCALES * np.abs(array).max(initial=0.0)
    return widths[[int(np.argmin([numbers.squared_error(width * levels) for width in widths]))]].astype(np.float64)


class _Sorted:
    """Sorted numbers with cumulative sums, by which any levels are judged in a time that hardly grows with n."""

    def __init__(self, array: np.ndarray) -> None:
        self.values = np.sort(_finite(array).astype(np.float64), axis=None)
        self.sums, self.squares = (np.concatenate([[0.0], np.cumsum(self.values**power)]) for power in (1, 2))

    def cells(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the numbers nearest to each level `[K]`: how many, their sum, the sum of their squares."""
        cuts = np.searchsorted(self.values, _middles(levels))
        bounds = np.concatenate([[0], cuts, [len(self.values)]])
        return np.diff(bounds), np.diff(self.sums[bounds]), np.diff(self.squares[bounds])

    def squared_error(self, levels: np.ndarray) -> float:
        """The sum of the squared distances to the nearest level."""
        counts, sums, squares = self.cells(levels)
        return float((squares - 2 * levels * sums + counts * levels**2).sum())

    def means(self, bounds: np.ndarray) -> np.ndarray:
        """The means between bounds in the sorted numbers, without those of nothing."""
        bounds = np.unique(bounds)
        return np.diff(self.sums[bounds]) / np.diff(bounds)

    def equal_shares(self, count: int) -> np.ndarray:
        """The means of `count` equal shares."""
        return self.means(np.rint(np.linspace(0, len(self.values), count + 1)).astype(np.int64))

    def starts(self, count: int) -> list[np.ndarray]:
        """Levels that Lloyd's algorithm may begin with."""
        ranks = np.linspace(0, len(self.values) - 1, 16 * count + 1).astype(np.int64)
        edges = self.values[ranks]
        # Between neighbouring edges lies the same share of numbers: the density is 1 / width, and its cube root times
        # the width is width^(2/3).
        mass = np.cumsum(np.diff(edges) ** (2 / 3))
        middles = (np.arange(count) + 0.5) / count
        even = np.linspace(self.values[0], self.values[-1], count)
        return [even, self.equal_shares(count), np.interp(middles * mass[-1], mass, edges[1:])]


def _fitted(array: np.ndarray, bits: int, fit: Callable[[_Sorted, int], np.ndarray]) -> np.ndarray:
    """Levels of an array; where it has zeros, which only pruning makes, one of them is 0."""
    flat = array.reshape(-1)
    others = flat[flat != 0]
    zeros = len(others) < len(flat)
    levels = fit(_Sorted(others), 2**bits - zeros) if len(others) else np.zeros(0)
    return np.unique(np.concatenate([levels, np.zeros(int(zeros))]).astype(np.float32))


def _kmeans(numbers: _Sorted, count: int) -> np.ndarray:
    distinct = np.unique(numbers.values)
    if len(distinct) <= count:
        return distinct
    ends = [_lloyd(numbers, start) for start in numbers.starts(count)]
    return min(ends, key=numbers.squared_error)


def _lloyd(numbers: _Sorted, levels: np.ndarray) -> np.ndarray:
    for _ in range(LLOYD_STEPS):
        counts, sums, _ = numbers.cells(levels)
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels


# ---- reading a code off the numbers --------------------------------------------------------------------------


def lossless(array: np.ndarray) -> Coded | None:
    """The smallest code that gives every number of an array back; None where none is smaller than the array.

    Few distinct numbers make a codebook; multiples of one number, in all or along an axis, make evenly spaced levels.
    """
    if array.dtype != np.float32 or not array.size or not np.isfinite(array).all():
        return None
    axes = [None, *range(array.ndim)] if array.ndim > 1 else [None]
    found = [_palette(array), *(_grid(array, axis) for axis in axes)]
    smaller = [coded for coded in found if coded is not None and coded.bytes() < array.nbytes]
    return min(smaller, key=Coded.bytes, default=None)


def stored(array: np.ndarray, huffman: bool) -> dict[str, np.ndarray]:
    """An array as what has to be stored of it: its `lossless` code, or its `values` as they are."""
    coded = lossless(array)
    return {"values": array} if coded is None else coded.arrays(huffman)


def restored(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Takes back what `stored` gave."""
    return arrays["values"] if "values" in arrays else Coded.from_arrays(arrays).decode()


_LOOK = 4096
"""Numbers looked at before all are."""


def _palette(array: np.ndarray) -> Coded | None:
    """A codebook of the distinct numbers, where they are at most 256."""
    if len(np.unique(array.reshape(-1)[:_LOOK])) > 2**MOST_BITS:
        return None
    levels, codes = np.unique(array, return_inverse=True)
    if len(levels) > 2**MOST_BITS:
        return None
    return _coded(array.shape, None, codes, _bits_for(len(levels) - 1), np.ones(1), np.zeros(1), levels)


def _grid(array: np.ndarray, axis: int | None) -> Coded | None:
    """Evenly spaced levels that all numbers lie on exactly, found as greatest common divisors of their mantissas."""
    rows = _grouped(array, axis)
    if _steps(rows[:8, :_LOOK]) is None:
        return None
    found = _steps(rows)
    if found is None:
        return None
    candidates = [_coded(array.shape, axis, codes, _bits_for(codes.max()), *tables) for codes, *tables in found]
    exact = [coded for coded in candidates if np.array_equal(coded.decode(), array)]
    return min(exact, key=Coded.bytes, default=None)


def _steps(rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None:
    """Codes, scale and zero of rows `[G, m]`, with zeros of their own and with one that all share; None without."""
    exponents = np.frexp(rows)[1]
    lowest = np.where(rows != 0, exponents, 2000).min(axis=1)
    lowest = np.where(lowest == 2000, 0, lowest)
    if (np.where(rows != 0, exponents, -2000).max(axis=1) - lowest).max() > 28:
        return None  # more than 2^28 steps apart, and integers would overflow
    unit = np.ldexp(1.0, lowest - 24)
    whole = (rows / unit[:, None]).astype(np.int64)
    smallest = whole.min(axis=1)
    apart, common = np.gcd.reduce(whole - smallest[:, None], axis=1), np.gcd.reduce(whole, axis=1)
    apart = np.where(apart > 0, apart, np.abs(smallest))  # a row of equal numbers
    found = []
    for step, shared in ((apart, False), (common, True)):
        step = np.where(step > 0, step, 1)
        zero = np.full(1, float(np.abs(whole // step[:, None]).max())) if shared else -smallest / step
        codes = whole / step[:, None] + zero[:, None]
        if codes.max() < 2**MOST_BITS:
            found.append((np.rint(codes), np.where(whole.any(axis=1), step * unit, 0.0), zero))
    return found or None


# ---- rows of equal scale -------------------------------------------------------------------------------------


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise DataError("an array must hold finite numbers to be coded; received NaN or infinity. Look at its source.")
    return array


def _grouped(array: np.ndarray, axis: int | None) -> np.ndarray:
    """The numbers that share a scale as rows, float64 `[G, m]`."""
    array = np.asarray(array, np.float64)
    return array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _along(part: np.ndarray, axis: int | None, ndim: int) -> np.ndarray:
    """Numbers `[1]` or `[shape[axis]]`, shaped so that they meet the axis of an array."""
    part = part.astype(np.float64)
    if axis is None or len(part) == 1:
        return part[0]
    return part.reshape([-1 if place == axis else 1 for place in range(ndim)])


def _coded(
    shape: tuple[int, ...],
    axis: int | None,
    rows: np.ndarray,
    bits: int,
    scale: np.ndarray,
    zero: np.ndarray,
    levels: np.ndarray | None = None,
) -> Coded:
    """The code of rows of indices, as `_grouped` cuts them."""
    codes = np.asarray(rows).astype(np.uint8)
    if axis is not None:
        others = [size for place, size in enumerate(shape) if place != axis]
        codes = np.moveaxis(codes.reshape(shape[axis], *others), 0, axis)
    scale, zero = (np.asarray(part, np.float32) for part in (scale, zero))
    if len(zero) and (zero == zero[0]).all():
        zero = zero[:1]
    return Coded(pack(codes, bits), bits, tuple(shape), scale, zero, levels, axis)


def _middles(levels: np.ndarray) -> np.ndarray:
    return (levels[1:] + levels[:-1]) / 2


def _bits_for(largest: int) -> int:
    """Bits of codes up to the largest."""
    return max(1, int(largest).bit_length())


def _short(scale: np.ndarray) -> np.ndarray:
    """Scales rounded up to `_SCALE_BITS` bits of mantissa."""
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.ceil(mantissa * 2**_SCALE_BITS) / 2**_SCALE_BITS, exponent)
