"""The tables that scorers read: in float32, or packed into 8 or 4 bits that are unpacked as they are read.

Packing is done to a scorer, never to what a member learned, and works in every form of the model: TensorFlow,
SavedModel and `.tflite`. Only stock operations are used.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fusion.compat import tf
from fusion.compression.codes import mse_limit, uniform

Bits = Literal[4, 8]


class Table(tf.Module):
    """A table of numbers float32 `[R, D]`, which can be packed."""

    def __init__(self, values: np.ndarray, name: str) -> None:
        super().__init__(name)
        self.shape = values.shape
        # A variable and not a constant: constants would be written into the graph, which protobuf limits to 2 GB.
        self._values: tf.Variable | None = tf.Variable(values, trainable=False, dtype=tf.float32, name=name)
        self._codes: Codes | None = None

    def rows(self, numbers: tf.Tensor) -> tf.Tensor:
        """Rows by number: int32 `[...]` -> float32 `[..., D]`."""
        return tf.gather(self._values, numbers) if self._codes is None else self._codes.rows(numbers)

    def dot(self, vectors: tf.Tensor) -> tf.Tensor:
        """Inner products of vectors `[B, D]` with all rows -> `[B, R]`."""
        if self._codes is None:
            return tf.matmul(vectors, self._values, transpose_b=True)
        return self._codes.dot(vectors)

    def write(self, numbers: tf.Tensor, rows: tf.Tensor) -> None:
        """Puts rows float32 `[N, D]` in the place of those of the numbers int32 `[N]`; the table must not be packed."""
        assert self._values is not None
        write_rows(self._values, numbers, rows)

    def numpy(self) -> np.ndarray:
        """The numbers float32 `[R, D]` as they are read."""
        every = self.rows(tf.range(self.shape[0]))
        result: np.ndarray = every.numpy()
        return result

    def pack(self, bits: Bits) -> None:
        """Keeps codes of so many bits in the place of the numbers, and a scale for each row."""
        if self._values is not None:
            self._codes, self._values = Codes(self._values.numpy(), bits, self.name), None


def write_rows(variable: tf.Variable, numbers: tf.Tensor, rows: tf.Tensor) -> None:
    """Puts `rows` `[N, ...]` in the place of the variable's rows of these numbers, int32 `[N]`.

    The variable is assigned whole: after a scatter into it TensorFlow would copy it in each call that reads it.
    """
    variable.assign(tf.tensor_scatter_nd_update(variable, numbers[:, None], rows))


class Codes(tf.Module):
    """Rows of integers with a scale each: number = code x scale, the codes being symmetric around 0.

    Args:
        values: float32 `[R, D]`.
        bits: of a code; two codes of 4 bits share a byte.
    """

    def __init__(self, values: np.ndarray, bits: Bits, name: str) -> None:
        super().__init__(name)
        self.bits, self.width = bits, values.shape[1]
        codes, scale = quantised(values, bits)
        stored = codes.astype(np.int8) if bits == 8 else _nibbles(codes)
        self.codes = tf.Variable(stored, trainable=False, name=f"{name}_codes")
        self.scale = tf.Variable(scale, trainable=False, dtype=tf.float32, name=f"{name}_scale")

    def rows(self, numbers: tf.Tensor) -> tf.Tensor:
        """As `Table.rows`."""
        return self._decoded(tf.gather(self.codes, numbers)) * tf.gather(self.scale, numbers)[..., None]

    def dot(self, vectors: tf.Tensor) -> tf.Tensor:
        """As `Table.dot`; the scales come last, which spares a product for every code."""
        return tf.matmul(vectors, self._decoded(self.codes), transpose_b=True) * self.scale

    def _decoded(self, stored: tf.Tensor) -> tf.Tensor:
        """Codes `[..., D]` as float32."""
        numbers = tf.cast(stored, tf.float32)
        if self.bits == 8:
            return numbers
        high = tf.floor(numbers / 16.0)
        both = tf.stack([high, numbers - 16.0 * high], axis=-1) - 8.0
        shape = tf.concat([tf.shape(numbers)[:-1], [2 * numbers.shape[-1]]], axis=0)
        return tf.reshape(both, shape)[..., : self.width]


def quantised(values: np.ndarray, bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes int32 `[R, D]` of float32 `[R, D]`, and the scale of each row, float32 `[R]`.

    Of 8 bits the largest number of a row has the largest code; of 4 bits the scale is the one with the least squared
    error, which cuts the largest numbers.
    """
    limit = mse_limit(values, bits, axis=0) if bits == 4 else None
    coded = uniform(values, bits, axis=0, limit=limit)
    return coded.codes.astype(np.int32) - (2 ** (bits - 1) - 1), coded.scale


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes from -7 to 7 `[R, D]`, two to a byte: uint8 `[R, ceil(D / 2)]`."""
    shifted = np.pad(codes + 8, [(0, 0), (0, codes.shape[1] % 2)]).astype(np.uint8)
    return shifted[:, 0::2] * 16 + shifted[:, 1::2]


class Numbers(tf.Module):
    """Numbers of items or users, `[R]` or `[R, C]`, 0 or more; packed they take 16 bits where all are below 2^16."""

    def __init__(self, values: np.ndarray, name: str) -> None:
        super().__init__(name)
        self.length = len(values)
        self._shift = 0
        self._values = tf.Variable(values, trainable=False, dtype=tf.int32, name=name)

    def rows(self, places: tf.Tensor) -> tf.Tensor:
        """Rows by number, int32."""
        found = tf.gather(self._values, places)
        return found if not self._shift else tf.cast(found, tf.int32) + self._shift

    def pack(self) -> None:
        """Keeps 16 bits of each where that is enough."""
        values = self._values.numpy()
        if values.dtype == np.int32 and values.max(initial=0) < 2**16:
            self._shift = 2**15  # into the range of int16: TFLite gathers no uint16
            self._values = tf.Variable((values - self._shift).astype(np.int16), trainable=False, name=self.name)


class NeighbourLists(tf.Module):
    """Numbers and weights of each item's neighbours, `[I, N]`; row I is that of the padding of histories.

    Packed, a row holds only the weights that count, the largest that together make up a share of the row's sum of
    magnitudes. Rows then differ in length and lie one after another; numbers take 16 bits where the catalogue allows.
    """

    def __init__(self, index: np.ndarray, weight: np.ndarray) -> None:
        super().__init__()
        padding = [(0, 1), (0, 0)]
        self._index: tf.Variable | None = tf.Variable(
            np.pad(index, padding), trainable=False, dtype=tf.int32, name="neighbour_index"
        )
        self._weight: tf.Variable | None = tf.Variable(
            np.pad(weight, padding), trainable=False, dtype=tf.float32, name="neighbour_weight"
        )
        self._packed: PackedLists | None = None

    def of(self, numbers: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Items int32 `[B, L]` -> their neighbours int32 `[B, L, M]` and weights float32 `[B, L, M]`, 0 for none."""
        if self._packed is not None:
            return self._packed.of(numbers)
        return tf.gather(self._index, numbers), tf.gather(self._weight, numbers)

    def pack(self, mass: float = 1.0) -> None:
        """Keeps of each row the largest weights that make up `mass` of it, in codes of 8 bits with a scale for the row.

        `mass` 1 loses only what rounds to 0.
        """
        if self._index is not None and self._weight is not None:
            self._packed = PackedLists(self._index.numpy(), self._weight.numpy(), mass)
            self._index = self._weight = None


class PackedLists(tf.Module):
    """As `NeighbourLists.pack` says: what is kept of rows `[I + 1, N]` of indices and weights."""

    def __init__(self, index: np.ndarray, weight: np.ndarray, mass: float) -> None:
        super().__init__()
        codes, scale = quantised(np.where(heaviest(weight, mass), weight, 0.0), 8)
        kept = codes != 0
        lengths = kept.sum(axis=1)
        self.longest = max(int(lengths.max(initial=0)), 1)
        starts = np.append(0, np.cumsum(lengths))
        # One entry too many, so that empty rows at the end read something.
        self.index = Numbers(np.append(index[kept], 0), "neighbour_index")
        self.index.pack()
        self.codes = tf.Variable(np.append(codes[kept], 0).astype(np.int8), trainable=False, name="neighbour_codes")
        self.starts = tf.Variable(starts.astype(np.int32), trainable=False, name="neighbour_starts")
        self.scale = tf.Variable(scale, trainable=False, dtype=tf.float32, name="neighbour_scale")

    def of(self, numbers: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As `NeighbourLists.of`, M being the length of the longest row."""
        start, end = tf.gather(self.starts, numbers)[..., None], tf.gather(self.starts, numbers + 1)[..., None]
        places = start + tf.range(self.longest)
        there = places < end
        places = tf.minimum(places, self.index.length - 1)
        codes = tf.cast(tf.gather(self.codes, places), tf.float32)
        weights = tf.where(there, codes, 0.0) * tf.gather(self.scale, numbers)[..., None]
        return self.index.rows(places), weights


def heaviest(weight: np.ndarray, mass: float) -> np.ndarray:
    """bool `[R, N]`: the largest magnitudes of each row that together make up `mass` of the row's sum, at least one."""
    if mass >= 1.0:
        return weight != 0
    magnitude = np.abs(weight)
    order = np.argsort(-magnitude, axis=1, kind="stable")
    sorted_ = np.take_along_axis(magnitude, order, axis=1)
    before = np.cumsum(sorted_, axis=1) - sorted_
    keep = (before < mass * sorted_.sum(axis=1, keepdims=True)) & (sorted_ > 0)
    result = np.zeros(weight.shape, bool)
    np.put_along_axis(result, order, keep, axis=1)
    return result


def pack(scorer: tf.Module, bits: Bits, mass: float = 1.0) -> int:
    """Packs all tables of a scorer, and says how many; lists of neighbours keep what makes up `mass` of each, in 8
    bits."""
    packed = 0
    for module in (scorer, *scorer.submodules):
        packed += isinstance(module, Table | Numbers | NeighbourLists)
        if isinstance(module, Table):
            module.pack(bits)
        elif isinstance(module, Numbers):
            module.pack()
        elif isinstance(module, NeighbourLists):
            module.pack(mass)
    return packed
