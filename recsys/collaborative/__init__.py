"""Members of a ranking: what each may be called in a config, and where it is."""

from fusion.registry import Registry

MEMBERS = Registry(
    "member",
    {
        "popularity": "recsys.collaborative.popularity:Popularity",
        "category_popularity": "recsys.collaborative.category_popularity:CategoryPopularity",
        "random_order": "recsys.collaborative.random_order:RandomOrder",
        "item_knn": "recsys.collaborative.item_knn:ItemKNN",
        "user_knn": "recsys.collaborative.user_knn:UserKNN",
        "rp3beta": "recsys.collaborative.rp3beta:RP3Beta",
        "pure_svd": "recsys.collaborative.pure_svd:PureSVD",
        "spectral_filter": "recsys.collaborative.spectral_filter:SpectralFilter",
        "ease": "recsys.collaborative.ease:Ease",
        "slim": "recsys.collaborative.slim:Slim",
        "ials": "recsys.collaborative.ials:ImplicitALS",
        "sequential_rules": "recsys.collaborative.sequential_rules:SequentialRules",
        "matrix_factorization": "recsys.collaborative.matrix_factorization:MatrixFactorization",
        "light_gcn": "recsys.collaborative.light_gcn:LightGCN",
        "mult_vae": "recsys.collaborative.mult_vae:MultVAE",
        "gru4rec": "recsys.collaborative.gru4rec:GRU4Rec",
        "sasrec": "recsys.collaborative.sasrec:SASRec",
        "node2vec": "recsys.collaborative.node2vec:Node2Vec",
        "content": "recsys.collaborative.content:Content",
        "content_regression": "recsys.collaborative.content_regression:ContentRegression",
        "two_tower": "recsys.collaborative.two_tower:TwoTower",
        "dcn": "recsys.collaborative.dcn:DeepCross",
    },
)
