"""The one place that decides which Keras is used: `tf_keras`, the Keras 2 API.

TFMOT and TFRS accept nothing else, and both look at `tf.keras` while they are imported, so
`TF_USE_LEGACY_KERAS=1` has to be set before TensorFlow is first touched. Everything else of ours takes
`tf`, `keras`, `tfrs()` and `tfmot()` from here and never imports them itself (a test holds this).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from types import ModuleType


def _choose_keras() -> None:
    chosen = os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    if chosen not in ("1", "true", "True"):
        raise ImportError(
            "TF_USE_LEGACY_KERAS must be 1 (TFMOT and TFRS need the Keras 2 API of tf_keras); "
            f"received TF_USE_LEGACY_KERAS={chosen}. Unset it, or set it to 1."
        )
    loaded = sys.modules.get("keras")
    if "tensorflow" in sys.modules and loaded is not None and "tf_keras" not in sys.modules:
        raise ImportError(
            "fusion must be imported before tf.keras is first used, because it selects tf_keras; "
            f"Keras {getattr(loaded, '__version__', '3')} is loaded already. Import fusion first."
        )


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up notes are not our users' concern
_choose_keras()


@contextlib.contextmanager
def _start_up_notes_held() -> Iterator[None]:
    """Holds back what the C++ side writes while it starts (processor flags, drivers that are not there): it writes
    before any log level is in force. Shown after all when starting fails."""
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


with _start_up_notes_held():
    import tensorflow as tf
    import tf_keras as keras

    tf.config.list_physical_devices()  # looks for drivers, and says so where there are none

logging.getLogger("tensorflow").setLevel(logging.ERROR)


def tfrs() -> ModuleType:
    """TensorFlow Recommenders, imported on first use (about a second)."""
    return importlib.import_module("tensorflow_recommenders")


def tfmot() -> ModuleType:
    """The TensorFlow Model Optimization Toolkit, imported on first use."""
    with warnings.catch_warnings():  # it compares versions by distutils, whose end setuptools announces
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("tensorflow_model_optimization")


def abort_exchanges(reason: str) -> None:
    """Ends all collective operations of this process with a DeadlineExceededError; there can be none afterwards."""
    # Not in TensorFlow's public interface: its own strategy calls the same when a process is lost.
    context = importlib.import_module("tensorflow.python.eager.context").context()
    context.abort_collective_ops(tf.errors.DEADLINE_EXCEEDED, reason)


__all__ = ["abort_exchanges", "keras", "tf", "tfmot", "tfrs"]
