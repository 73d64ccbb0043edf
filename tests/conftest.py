"""Shared by all tests: which Keras is chosen before anything touches TensorFlow, and where real data lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusion.compat  # noqa: F401  (first, so that tf_keras is chosen)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; tests that need it carry the marker `data`."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("FUSION_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder}; set FUSION_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="module")
def short_clocks() -> Iterator[None]:
    """Latencies out of a few calls, for tests of what is compressed and not of how fast it is."""
    from fusion.compression import measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "LATENCY_SECONDS", 0.01)
        patch.setattr(measure, "FEWEST_CALLS", 3)
        yield
