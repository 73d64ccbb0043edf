"""Members of a ranking: what each may be called in a config, and where it is."""

from fusion.registry import Registry

MEMBERS = Registry(
    "member",
    {
        "popularity": "recsys.collaborative.popularity:Popularity",
        "category_popularity": "recsys.collaborative.category_popularity:CategoryPopularity",
        "random_order": "recsys.collaborative.random_order:RandomOrder",
        "item_knn": "recsys.collaborative.item_knn:ItemKNN",
        "ease": "recsys.collaborative.ease:Ease",
        "ials": "recsys.collaborative.ials:ImplicitALS",
        "sequential_rules": "recsys.collaborative.sequential_rules:SequentialRules",
        "matrix_factorization": "recsys.collaborative.matrix_factorization:MatrixFactorization",
        "content": "recsys.collaborative.content:Content",
    },
)
