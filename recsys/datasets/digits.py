"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels in ten classes, nothing to download."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

from fusion.config import Settings
from recsys.schema import IMAGE, LABEL, Tables


class Digits:
    """Reads the digits as labelled images."""

    class Config(Settings):
        """Nothing to set: the data are part of scikit-learn."""

    @staticmethod
    def read(config: Digits.Config) -> Tables:
        """Labels as text, images as uint8 `[8, 8]` with the source's 0..16 spread over 0..255."""
        source = load_digits()
        images = np.rint(source.images * (255 / 16)).astype(np.uint8)
        table = pd.DataFrame({LABEL: pd.Series(source.target.astype(str), dtype="str")})
        table[IMAGE] = pd.Series(list(images), dtype=object)
        origin = "Optical recognition of handwritten digits (UCI), from scikit-learn."
        return Tables(table, "digits", notes=[origin])
