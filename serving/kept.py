"""Answers that are kept: whoever asks the same again, while nothing has changed, is answered without the graph.

A graph of a loaded version answers the same question in the same way, until items are added to it or withdrawn. A
reloaded page, and all visitors of whom nothing is known, ask what was asked before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from serving.inputs import Arrays

LARGEST_QUESTION, LARGEST_ANSWER = 4 * 1024, 64 * 1024
"""Bytes beyond which a question is not looked up, such as a picture, and an answer not kept, such as the scores of a
whole catalogue."""
Key = tuple[object, ...]


class Kept:
    """The latest answers to questions of one row. Safe to use from any thread.

    Args:
        most: answers that are kept; the one that was not asked for longest leaves.
        changes: how often the graph has changed. What was computed before the latest change is never given again.
    """

    def __init__(self, most: int, changes: Callable[[], int]) -> None:
        self._most, self._changes = most, changes
        self._lock = threading.Lock()
        self._answers: dict[Key, Arrays] = {}  # the latest asked last
        self._seen = changes()

    def __len__(self) -> int:
        return len(self._answers)

    def key(self, signature: str, arrays: Arrays) -> Key | None:
        """What names a question as of now; None for several rows, and for what is too large. To be made before the
        question is computed."""
        key: list[object] = [self._changes(), signature]
        size = 0
        for array in arrays.values():
            if len(array) != 1:
                return None
            if array.dtype == object:
                texts = array.ravel().tolist()
                size += sum(map(len, texts)) + 8 * len(texts)
                key += texts
            else:
                size += array.nbytes
                key.append(array.tobytes() if size <= LARGEST_QUESTION else b"")
            key.append(array.shape)
            if size > LARGEST_QUESTION:
                return None
        return tuple(key)

    def get(self, key: Key) -> Arrays | None:
        """The answer to a question, None where it is not kept."""
        with self._lock:
            answer = self._answers.pop(key, None)
            if answer is not None:
                self._answers[key] = answer
            return answer

    def put(self, key: Key, answer: Arrays) -> None:
        """Keeps an answer, read only and apart from the batch that it was computed in."""
        size = sum(_bytes(values) for values in answer.values())
        if size > LARGEST_ANSWER:
            return
        own = {name: values.copy() for name, values in answer.items()}
        for values in own.values():
            values.flags.writeable = False
        with self._lock:
            changes = self._changes()
            if changes != self._seen:  # questions of before are not asked again under these keys
                self._answers.clear()
                self._seen = changes
            if key[0] != changes:
                return
            self._answers[key] = own
            if len(self._answers) > self._most:
                del self._answers[next(iter(self._answers))]


def _bytes(values: np.ndarray) -> int:
    """Those of a text count too."""
    return values.nbytes + (sum(map(len, values.ravel().tolist())) if values.dtype == object else 0)
