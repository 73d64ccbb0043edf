"""Answers from one artifact: checked inputs in, numpy arrays out, errors only from `serving.errors`.

Every door (gRPC, REST, batch jobs, the command line) goes through `Predictor.predict`, so that one request gets one
answer. Knows nothing of training, of Keras or of the models inside the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from fusion.export.manifest import EngineError, Manifest, Signature, TensorSpec, verify_manifest
from serving.errors import ArtifactRefused, InvalidRequest, LimitExceeded, Overloaded, ServingError, UnknownSignature
from serving.limits import Limits

Arrays = dict[str, np.ndarray]


class Predictor:
    """One loaded artifact.

    Attributes:
        manifest: what the artifact says about itself, verified.
        limits: how large a request may be.
    """

    def __init__(self, model: Any, manifest: Manifest, limits: Limits) -> None:
        self.manifest = manifest
        self.limits = limits
        self._model = model  # owns the variables of the signatures

    @classmethod
    def load(cls, artifact_folder: str | Path, limits: Limits | None = None) -> Predictor:
        """Verifies the artifact's manifest and loads its SavedModel.

        The largest `k` is the smaller one of `limits.k` and the artifact's own `k_max`. Raises ArtifactRefused.
        """
        limits = limits or Limits()
        try:
            manifest = verify_manifest(artifact_folder)
            model = tf.saved_model.load(str(artifact_folder))
        except EngineError as error:
            raise ArtifactRefused(str(error)) from error
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise ArtifactRefused(f"{artifact_folder} must be a SavedModel; TensorFlow answered: {error}.") from error
        missing = set(manifest.signatures) - set(model.signatures)
        if missing:
            raise ArtifactRefused(f"{artifact_folder} must have its manifest's signatures; it lacks {sorted(missing)}.")
        k_max = min(limits.k, manifest.limits.get("k_max", limits.k))
        return cls(model, manifest, dataclasses.replace(limits, k=k_max))

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the submodels, in the order of axis S of `contributions`."""
        return self.manifest.members

    def predict(self, signature: str, inputs: Mapping[str, Any]) -> Arrays:
        """Runs one signature.

        Args:
            signature: its name.
            inputs: every input of the signature, by name, as arrays or nested lists. Text may be str or bytes;
                whole numbers of any width are accepted where they fit.

        Returns the outputs by name; text as arrays of `bytes` objects.

        Raises:
            UnknownSignature: the artifact has no such signature.
            InvalidRequest: a name, dtype, shape or value does not fit; LimitExceeded when it is too large.
            Overloaded: no memory for it. ServingError: anything else.
        """
        specs = self._signature(signature).inputs
        tensors = {name: tf.constant(value) for name, value in check_inputs(specs, inputs, self.limits).items()}
        try:
            outputs = self._model.signatures[signature](**tensors)
            return {name: value.numpy() for name, value in outputs.items()}
        except tf.errors.InvalidArgumentError as error:
            raise InvalidRequest(f"'{signature}' cannot answer these inputs: {error.message}.") from error
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise Overloaded("the request needs more memory than is free; send fewer rows, or try again.") from error
        except (tf.errors.OpError, ValueError, TypeError) as error:
            raise ServingError(f"'{signature}' failed: {error}") from error

    def _signature(self, name: str) -> Signature:
        if name not in self.manifest.signatures:
            known = ", ".join(sorted(self.manifest.signatures))
            raise UnknownSignature(f"the artifact has the signatures {known}; received '{name[:100]}'.")
        return self.manifest.signatures[name]

    def recommend(
        self,
        user_ids: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        k: int = 10,
        exclude: Sequence[Sequence[str]] | None = None,
        include: Sequence[Sequence[str]] | None = None,
    ) -> Arrays:
        """The k best items for users, by their id, by a history of item ids, or both: a history is added to what is
        stored of a known user.

        Args:
            user_ids: B ids.
            histories: B lists of item ids.
            k: items per user.
            exclude: B lists of items that must not be returned.
            include: B lists of the only items that may be returned; an empty list allows all.

        Returns `item_ids` `[B, k]` bytes (`b''` beyond the last), `scores` float32 `[B, k]`, `contributions`
        float32 `[B, S, k]` that sum to the scores up to the ensemble's bias, `known_user` bool `[B]`.
        """
        rows = self._rows(user_ids=user_ids, histories=histories, exclude=exclude, include=include)
        empty: list[list[str]] = [[]] * rows
        answer = self.predict(
            "recommend",
            {
                "user_id": list(user_ids) if user_ids is not None else [""] * rows,
                "history": pad_strings(histories if histories is not None else empty),
                "k": np.full(rows, k, np.int64),
                "exclude": pad_strings(exclude if exclude is not None else empty),
                "include": pad_strings(include if include is not None else empty),
            },
        )
        return {name: value if name == "known_user" else value[..., :k] for name, value in answer.items()}

    def similar_items(self, item_ids: Sequence[str], k: int = 10) -> Arrays:
        """The k items most like each of B items, and never the item itself; an unknown item is like nothing.

        Returns `item_ids` `[B, k]` bytes (`b''` beyond the last), `scores` float32 `[B, k]`, `contributions` float32
        `[B, S, k]`.
        """
        answer = self.predict("similar_items", {"item_id": list(item_ids), "k": np.full(len(item_ids), k, np.int64)})
        return {name: value[..., :k] for name, value in answer.items()}

    def search(self, name: str, inputs: Mapping[str, Any], k: int = 10) -> Arrays:
        """The k items nearest to B examples by the cosine of the embeddings of `name` (a member that reads content).

        Args:
            name: the signature is `search_<name>`; UnknownSignature when the artifact has none.
            inputs: the examples as the encoder's inputs, without `k` (`recsys.examples` makes them of text or images).
            k: items per example.

        Returns `item_ids` `[B, k]` bytes (`b''` beyond the last) and `scores` float32 `[B, k]`, the cosines.
        """
        rows = len(next(iter(inputs.values()), ()))
        answer = self.predict(f"search_{name}", {**inputs, "k": np.full(rows, k, np.int64)})
        return {output: value[..., :k] for output, value in answer.items()}

    @staticmethod
    def _rows(**lists: Sequence[Any] | None) -> int:
        lengths = {name: len(values) for name, values in lists.items() if values is not None}
        if lists["user_ids"] is None and lists["histories"] is None:
            raise InvalidRequest("a recommendation needs user ids or histories; received neither.")
        if len(set(lengths.values())) != 1:
            raise InvalidRequest(f"all lists must have one entry per user; received the lengths {lengths}.")
        return next(iter(lengths.values()))


def pad_strings(lists: Sequence[Sequence[str]]) -> np.ndarray:
    """Lists of text as one object array `[B, L]` of UTF-8 bytes, padded with `b''`.

    L is the next power of two (at least 1), so that a serving graph meets few different shapes.
    """
    longest = max((len(values) for values in lists), default=0)
    padded = np.full((len(lists), 1 << max(longest - 1, 0).bit_length()), b"", object)
    for row, values in enumerate(lists):
        padded[row, : len(values)] = [_utf8(value, "the list") for value in values]
    return padded


def check_inputs(specs: Mapping[str, TensorSpec], inputs: Mapping[str, Any], limits: Limits) -> Arrays:
    """The inputs as arrays of exactly the dtypes that the signature takes. Raises InvalidRequest or LimitExceeded."""
    missing, unknown = sorted(set(specs) - set(inputs)), sorted(set(inputs) - set(specs))
    if missing or unknown:
        received = f"missing {missing}" if missing else f"unknown {[name[:100] for name in unknown]}"
        raise InvalidRequest(f"the inputs must be {', '.join(sorted(specs))}; {received}.")
    arrays = {name: _array(name, inputs[name], spec, limits) for name, spec in specs.items()}
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidRequest(f"all inputs must have the same number of rows; received {sizes}.")
    total = sum(array.nbytes for array in arrays.values())
    if total > limits.total_bytes:
        raise LimitExceeded(f"a request must have at most {limits.total_bytes} bytes; received {total}.")
    return arrays


def _array(name: str, value: Any, spec: TensorSpec, limits: Limits) -> np.ndarray:
    try:
        array = np.asarray(value, object if spec.dtype == "string" else None)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"'{name}' must be an array; received rows of different lengths.") from error
    _check_shape(name, array, spec, limits)
    if spec.dtype == "string":
        return _strings(name, array, limits)
    array = _numbers(name, array, np.dtype(spec.dtype))
    if name == "k" and array.size and not 1 <= array.min() <= array.max() <= limits.k:
        raise LimitExceeded(f"'k' must be between 1 and {limits.k}; received {array.min()} to {array.max()}.")
    return array


def _check_shape(name: str, array: np.ndarray, spec: TensorSpec, limits: Limits) -> None:
    fits = array.ndim == len(spec.shape) and all(
        wanted in (None, size) for wanted, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or not array.ndim or not array.shape[0]:
        wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise InvalidRequest(f"'{name}' must have the shape [{wanted}] with at least one row; received {array.shape}.")
    if array.shape[0] > limits.rows:
        raise LimitExceeded(f"a request must have at most {limits.rows} rows; '{name}' has {array.shape[0]}.")
    longest = limits.length(name)
    if longest is not None and array.shape[1] > longest:
        raise LimitExceeded(f"'{name}' must have at most {longest} entries a row; received {array.shape[1]}.")


def _strings(name: str, array: np.ndarray, limits: Limits) -> np.ndarray:
    encoded = [_utf8(value, f"'{name}'") for value in array.ravel()]
    longest = max((len(value) for value in encoded), default=0)
    if longest > limits.id_bytes:
        raise LimitExceeded(f"every id must have at most {limits.id_bytes} bytes; one of '{name}' has {longest}.")
    result = np.empty(array.size, object)
    result[:] = encoded
    return result.reshape(array.shape)


def _utf8(value: Any, where: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} must hold text; received a {type(value).__name__}.")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{where} must hold valid Unicode; received {value!r:.60}.") from error


def _numbers(name: str, array: np.ndarray, wanted: np.dtype[Any]) -> np.ndarray:
    whole = array.dtype.kind in "iu" and wanted.kind in "iu"
    if whole and array.size and not (np.iinfo(wanted).min <= array.min() <= array.max() <= np.iinfo(wanted).max):
        raise InvalidRequest(f"'{name}' must fit {wanted}; received {array.min()} to {array.max()}.")
    if not whole and not np.can_cast(array.dtype, wanted, "same_kind"):
        raise InvalidRequest(f"'{name}' must be {wanted}; received {array.dtype}.")
    return array.astype(wanted, copy=False)
