"""Makes fitted models smaller and faster, and measures what that costs: one file and one line here for each method."""

from __future__ import annotations

from fusion.registry import Registry

METHODS = Registry(
    "compression method",
    {
        "binary": "fusion.compression.low_bit:Binary",
        "channels": "fusion.compression.channels:Channels",
        "clip_activations": "fusion.compression.activations:ClipActivations",
        "cluster": "fusion.compression.clustering:Cluster",
        "codebook": "fusion.compression.codebooks:Codebook",
        "distil": "fusion.compression.distillation:Distillation",
        "dynamic_range": "fusion.compression.ptq:DynamicRange",
        "float16": "fusion.compression.ptq:Float16",
        "gaussian": "fusion.compression.gaussian:Gaussian",
        "int16x8": "fusion.compression.ptq:Int16x8",
        "int4": "fusion.compression.ptq:Int4",
        "int8": "fusion.compression.ptq:Int8",
        "l0": "fusion.compression.l0:L0",
        "prune": "fusion.compression.pruning:Prune",
        "prune_by_sensitivity": "fusion.compression.sensitivity:PruneBySensitivity",
        "qat": "fusion.compression.qat:Qat",
        "simple_activations": "fusion.compression.activations:SimpleActivations",
        "sparse_regression": "fusion.compression.sparse_regression:SparseRegression",
        "ternary": "fusion.compression.low_bit:Ternary",
        "trim": "fusion.compression.trim:Trim",
        "uniform": "fusion.compression.codebooks:Uniform",
    },
)

__all__ = ["METHODS"]
