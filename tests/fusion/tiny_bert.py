"""Writes a folder in Hugging Face's BERT layout with a model of a few numbers, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fusion.submodels.text_bert import read_shape, tensor_shapes

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "and",
    "blue",
    "film",
    "night",
    "of",
    "red",
    "sea",
    "the",
    "war",
    "##s",
]
SHAPE = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}


def write_tiny_bert(folder: Path, **changes: object) -> Path:
    """config.json (SHAPE with `changes`), random model.safetensors and tokenizer.json; returns the folder."""
    (folder / "config.json").write_text(json.dumps(SHAPE | changes))
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(0, 0.5, shape).astype(np.float32)
        for name, shape in tensor_shapes(read_shape(folder)).items()
    }
    save_file(tensors, folder / "model.safetensors")
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def tiny_tokenizer() -> Tokenizer:
    """WordPiece over WORDS, lowercase, with [CLS] and [SEP] around each text."""
    ids = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer
