"""scikit-learn's packaged tables for classification: small, real, nothing to download."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn import datasets

from fusion.config import Settings
from recsys.schema import IMAGE, LABEL, Tables

_ORIGINS = {
    "wine": "Chemical analyses of wines from three cultivars (UCI), from scikit-learn.",
    "breast_cancer": "Breast cancer Wisconsin, diagnostic (UCI), from scikit-learn.",
    "iris": "Fisher's irises (UCI), from scikit-learn.",
    "digits": "Optical recognition of handwritten digits (UCI), from scikit-learn, pixels as columns.",
}


class SklearnTables:
    """Reads one of the packaged tables as labelled rows with a column a feature."""

    class Config(Settings):
        """Which table."""

        name: Literal["wine", "breast_cancer", "iris", "digits"] = "wine"
        """wine: 178 rows, 13 columns, 3 classes; breast_cancer: 569, 30, 2; iris: 150, 4, 3; digits: 1797, 64, 10."""

    @staticmethod
    def read(config: SklearnTables.Config) -> Tables:
        """Labels by their names, features as text as every reader gives it, columns in lower case with `_`."""
        source: Any = getattr(datasets, f"load_{config.name}")()
        names = np.asarray(source.target_names).astype(str)
        table = {LABEL: pd.Series(names[source.target], dtype="str")}
        for name, numbers in zip(source.feature_names, source.data.T, strict=True):
            column = re.sub(r"\W+", "_", name).strip("_").lower()
            table[column] = pd.Series([repr(float(number)) for number in numbers], dtype="str")
        examples = pd.DataFrame({**table, IMAGE: ""})
        return Tables(examples, config.name, notes=[_ORIGINS[config.name]])
