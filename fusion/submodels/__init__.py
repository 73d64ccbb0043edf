"""Content encoders, each behind the one `Submodel` interface; a name is imported only when it is used."""

from fusion.registry import Registry

SUBMODELS = Registry(
    "submodel",
    {
        "text_bert": "fusion.submodels.text_bert:TextBert",
        "text_bert_long": "fusion.submodels.text_bert_long:TextBertLong",
        "text_tfidf": "fusion.submodels.text_tfidf:TextTfidf",
        "text_convolution": "fusion.submodels.text_convolution:TextConvolution",
        "text_recurrent": "fusion.submodels.text_recurrent:TextRecurrent",
        "image_efficientnet": "fusion.submodels.image_efficientnet:ImageEfficientNet",
        "image_backbone": "fusion.submodels.image_backbone:ImageBackbone",
        "image_cnn": "fusion.submodels.image_cnn:ImageCnn",
        "dense": "fusion.submodels.dense:Dense",
    },
)

__all__ = ["SUBMODELS"]
