"""The graph of an artifact, loaded and called as TensorFlow Serving does it: in a session.

A call hands its arrays to TensorFlow and gets arrays back in one step, for which it lets go of Python's interpreter
once. Called as a function of TensorFlow 2 the same signature makes a tensor of each input, an array of each output, and
waits for the interpreter in between, which doubles the time of a small call beside a busy event loop. `Session.run`,
and `make_callable` which ends there, look up all feeds and fetches again in each call: 440 and not 240 us for six rows
of a small graph. So what is to be run is settled once, in C++.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from serving.inputs import Arrays


class _Call(NamedTuple):
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., list[Any]]


class GraphSession:
    """The signatures of one SavedModel. Safe to use from any thread; its variables go with it.

    Args:
        folder: of the SavedModel.
        cores: that one call may keep busy; None is all. TensorFlow makes its threads once in a process, so the first
            session decides.

    Raises OSError, ValueError, RuntimeError or `tf.errors.OpError` for a folder that holds none.
    """

    def __init__(self, folder: Path, cores: int | None = None) -> None:
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=cores or 0,
            inter_op_parallelism_threads=RUN_IN_CALLER if cores == 1 else cores or 0,
        )
        # It would rewrite the whole graph for each signature: half a second before a first answer, and no later one
        # is faster for it.
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        with graph.as_default(), _without_advice():
            loaded = tf.compat.v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(folder))
        self._definitions: Mapping[str, Any] = loaded.signature_def
        self._calls: dict[str, _Call] = {}
        self._lock = threading.Lock()

    @property
    def signatures(self) -> set[str]:
        """Their names."""
        return set(self._definitions)

    def run(self, signature: str, arrays: Arrays) -> Arrays:
        """The outputs of a signature for inputs of exactly its dtypes, by name. Raises `tf.errors.OpError`."""
        call = self._calls.get(signature) or self._made(signature)
        return dict(zip(call.outputs, call.run(*[arrays[name] for name in call.inputs]), strict=True))

    def _made(self, signature: str) -> _Call:
        """The callable of a signature, made when it is first asked for."""
        with self._lock:
            if signature not in self._calls:
                definition = self._definitions[signature]
                options = config_pb2.CallableOptions(
                    feed=[tensor.name for tensor in definition.inputs.values()],
                    fetch=[tensor.name for tensor in definition.outputs.values()],
                )
                # It has no public name; TensorFlow's own debugger calls it as well.
                run = self._session._make_callable_from_options(options)
                self._calls[signature] = _Call(tuple(definition.inputs), tuple(definition.outputs), run)
            return self._calls[signature]


RUN_IN_CALLER = -1
"""Operations run one after the other on the thread that calls, instead of being handed to another one."""


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """TensorFlow advises to load a SavedModel in another way, in a warning; its session has no other one."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
