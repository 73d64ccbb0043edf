"""Answers from a folder that was copied to a phone (`tools/export.py RUN --phone DIR`), by LiteRT alone.

The calls, their checks, their errors and their answers are those of `serving.predictor`, so that an app, or a test of
one, can ask the one or the other. TensorFlow is not imported. What an app in another language has to do around the
`.tflite` files is what stands here: numbers of ids, cutting and padding of the history, top-k of what was not seen.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from fusion.export.manifest import EngineError, Manifest, verify_manifest
from serving.errors import ArtifactRefused, Overloaded, ServingError
from serving.inputs import Arrays, check_inputs, first_items, recommend_inputs, signature_of
from serving.limits import Limits

SIGNATURES, ITEMS = "signatures.json", "items.json"
PADDING = -1
UNSCORED = float(np.finfo(np.float32).min)
"""Score of a candidate about which no member says anything. A `.tflite` has the lowest number in the place of -inf."""
SILENT = UNSCORED / 2
"""What lies below says that nobody spoke."""
RECOMMENDER = "recommender"
CORE, SCORED, MEMBER = "recommend", "serving_default", "member_"
"""The signatures of a recommender over ids, which are answered around a file; of members all names that begin so."""


class TFLiteRunner:
    """One loaded folder.

    Users are not on the phone: everybody is answered from the history, of which the files take the latest items.

    Attributes:
        manifest: what the folder says about itself, verified.
        limits: how large a request may be.
    """

    def __init__(
        self, manifest: Manifest, limits: Limits, files: Mapping[str, tuple[_File, str]], items: Sequence[bytes]
    ) -> None:
        self.manifest = manifest
        self.limits = limits
        self._files = dict(files)
        self._items = np.array([*items, b""], object)
        self._numbers = {item: number for number, item in enumerate(items)}

    @classmethod
    def load(cls, folder: str | Path, limits: Limits | None = None, threads: int = 1) -> TFLiteRunner:
        """Verifies the folder's manifest and opens its `.tflite` files.

        Args:
            folder: as `tools/export.py --phone` wrote it.
            limits: of a request; the largest `k` is the smaller one of `limits.k` and the model's own `k_max`.
            threads: how many an operation may share.

        Raises ArtifactRefused where a file is not as the manifest says, or is not a whole `.tflite`.
        """
        limits = limits or Limits()
        folder = Path(folder)
        try:
            manifest = verify_manifest(folder)
        except EngineError as error:
            raise ArtifactRefused(str(error)) from error
        try:
            described = _read(folder / SIGNATURES)["signatures"]
            places = {name: (str(found["file"]), str(found["signature"])) for name, found in described.items()}
            items = [str(item["id"]).encode() for item in _read(folder / ITEMS)] if ITEMS in manifest.files else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactRefused(f"{folder} must be a folder for phones; its JSON files are not ({error}).") from error
        missing = set(manifest.signatures) ^ set(places) | {file for file, _ in places.values()} - set(manifest.files)
        if missing:
            raise ArtifactRefused(f"{folder} must have a file for each of its signatures; it lacks {sorted(missing)}.")
        opened = {file: _File(folder / file, threads) for file in sorted({file for file, _ in places.values()})}
        for file, signature in places.values():
            if signature not in opened[file].lengths:
                raise ArtifactRefused(f"{folder / file} must have the signature '{signature}'; it has not.")
        files = {name: (opened[file], signature) for name, (file, signature) in places.items()}
        k_max = min(limits.k, manifest.limits.get("k_max", limits.k))
        return cls(manifest, dataclasses.replace(limits, k=k_max), files, items)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the submodels, in the order of axis S of `contributions`."""
        return self.manifest.members

    def predict(self, signature: str, inputs: Mapping[str, Any]) -> Arrays:
        """Runs one signature; arguments, answer and errors are those of `serving.predictor.Predictor.predict`.

        The files take one row, so B rows are B runs. `contributions` are there where the rule is additive.
        """
        arrays = check_inputs(signature_of(self.manifest, signature).inputs, inputs, self.limits)
        rows = [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(_rows(arrays))]
        answers = [self._answer(signature, row) for row in rows]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def recommend(
        self,
        user_ids: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        k: int = 10,
        exclude: Sequence[Sequence[str]] | None = None,
        include: Sequence[Sequence[str]] | None = None,
    ) -> Arrays:
        """The k best items; arguments, answer and errors are those of `serving.predictor.Predictor.recommend`.

        No user is known here, so that without histories everybody gets what is best for a stranger.
        """
        asked = recommend_inputs(user_ids, histories, k, exclude, include, self.limits)
        return first_items(self.predict(CORE, asked), k)

    def _answer(self, signature: str, row: Arrays) -> Arrays:
        """The answer for one row, B = 1."""
        file, inside = self._files[signature]
        over_ids = signature in (CORE, SCORED) or signature.startswith(MEMBER)
        if self.manifest.kind != RECOMMENDER or not over_ids:
            return file.run(inside, row)
        history = self._lookup(row["history"][0])
        said = file.run(inside, {"history": _latest(history, file.lengths[inside]["history"])})
        scores = said["scores"][0]
        silent = ~(np.isfinite(scores) & (scores > SILENT))
        if signature.startswith(MEMBER):
            return {"scores": np.where(silent, np.nan, scores)[None].astype(np.float32)}
        if signature == SCORED:
            numbers = self._lookup(row["candidates"][0])
            unscored = (numbers < 0) | silent[np.maximum(numbers, 0)]
            return {"scores": np.where(unscored, UNSCORED, scores[np.maximum(numbers, 0)])[None].astype(np.float32)}
        silent |= self._marked(history) | self._marked(self._lookup(row["exclude"][0]))
        if (row["include"][0] != b"").any():
            silent |= ~self._marked(self._lookup(row["include"][0]))
        best = top_k(np.where(silent, -np.inf, scores), int(row["k"][0]))
        return self._listed(said, best)

    def _listed(self, said: Arrays, best: np.ndarray) -> Arrays:
        """The items with the numbers `best`, padded to the length that the model promises."""
        pad = self.manifest.limits["k_max"] - len(best)
        answer = {
            "item_ids": np.pad(self._items[best], (0, pad), constant_values=b"")[None],
            "scores": np.pad(said["scores"][0, best], (0, pad))[None],
            "known_user": np.array([False]),
        }
        if "contributions" in said:
            answer["contributions"] = np.pad(said["contributions"][0][:, best], ((0, 0), (0, pad)))[None]
        return answer

    def _lookup(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of ids, -1 for unknown ones."""
        return np.array([self._numbers.get(item, PADDING) for item in ids], np.int64)

    def _marked(self, numbers: np.ndarray) -> np.ndarray:
        """bool `[I]`: which items stand among the numbers."""
        marked = np.zeros(len(self._numbers), bool)
        marked[numbers[numbers >= 0]] = True
        return marked


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k best of `[I]`, best first and of equal ones the first; fewer where fewer are finite."""
    candidates = np.flatnonzero(np.isfinite(scores))
    if len(candidates) > k:
        worst = np.partition(scores[candidates], len(candidates) - k)[len(candidates) - k]
        candidates = candidates[scores[candidates] >= worst]
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]


def _latest(history: np.ndarray, length: int) -> np.ndarray:
    """The known items of a history int64 `[N]`, each where it stands last; of more than `length` the latest: int32
    `[1, length]`, padded with -1."""
    known = history[history >= 0]
    distinct, from_the_end = np.unique(known[::-1], return_index=True)
    ordered = distinct[np.argsort(-from_the_end)][-length:]
    return np.pad(ordered, (0, length - len(ordered)), constant_values=PADDING)[None].astype(np.int32)


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class _File:
    """One `.tflite` file, whose shapes are fixed, and the lock that its memory needs."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            runners = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}
            self.lengths = {
                signature: {name: int(detail["shape"][-1]) for name, detail in runner.get_input_details().items()}
                for signature, runner in runners.items()
            }
            # A runner prepares the graph in each call, which takes longer than a small graph takes to run. A file with
            # one signature can do without; only one of the two is kept, because each would hold the other's memory.
            alone = next(iter(runners.values())) if len(runners) == 1 else None
            self._places = (
                [{n: d["index"] for n, d in side.items()} for side in _details(alone)] if alone is not None else []
            )
            self._runners = {} if alone is not None else runners
            self._interpreter = interpreter if alone is not None else None
            del alone, runners
            if self._interpreter is not None:
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            sentence = f"{path} must be a .tflite file that is whole; it cannot be read: {_line(error)}."
            raise ArtifactRefused(sentence) from error

    def run(self, signature: str, row: Arrays) -> Arrays:
        """Named inputs of one row -> named outputs, copies of their own."""
        try:
            with self._lock:
                return self._invoke(row) if self._interpreter is not None else dict(self._runners[signature](**row))
        except MemoryError as error:
            raise Overloaded("the request needs more memory than is free; try again.") from error
        except (ValueError, RuntimeError) as error:
            raise ServingError(f"'{self._path.name}' failed: {_line(error)}.") from error

    def _invoke(self, row: Arrays) -> Arrays:
        interpreter: Any = self._interpreter
        takes, gives = self._places
        for name, array in row.items():
            interpreter.set_tensor(takes[name], array)
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in gives.items()}


def _details(runner: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return runner.get_input_details(), runner.get_output_details()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
