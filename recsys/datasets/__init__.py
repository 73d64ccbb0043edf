"""Readers: from what lies on the disk, or in a package, to the plain tables of `recsys.schema.Tables`.

A reader has a `Config` and `read(config) -> Tables`. It turns columns into our names and ids into strings and
does no more: what is wrong with the rows is found, counted and removed by `recsys.cleaning`.
"""

from __future__ import annotations

from fusion.registry import Registry

READERS = Registry(
    "data set reader",
    {
        "folder": "recsys.datasets.folder:Folder",
        "movielens": "recsys.datasets.movielens:MovieLens",
        "movielens_package": "recsys.datasets.movielens:MovieLensPackage",
        "recbole": "recsys.datasets.recbole:RecBole",
        "lightgcn": "recsys.datasets.lightgcn:LightGCN",
        "sklearn_digits": "recsys.datasets.digits:Digits",
        "sklearn_tables": "recsys.datasets.sklearn_tables:SklearnTables",
        "planted": "recsys.datasets.planted:Planted",
        "long_tail": "recsys.datasets.long_tail:LongTail",
        "planted_classes": "recsys.datasets.planted:PlantedClasses",
    },
)

__all__ = ["READERS"]
