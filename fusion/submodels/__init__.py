"""Content encoders, each behind the one `Submodel` interface; a name is imported only when it is used."""

from fusion.registry import Registry

SUBMODELS = Registry(
    "submodel",
    {
        "text_bert": "fusion.submodels.text_bert:TextBert",
        "text_tfidf": "fusion.submodels.text_tfidf:TextTfidf",
        "image_efficientnet": "fusion.submodels.image_efficientnet:ImageEfficientNet",
        "image_cnn": "fusion.submodels.image_cnn:ImageCnn",
    },
)

__all__ = ["SUBMODELS"]
