"""Counts the floating-point operations of a graph: how many, not how fast; a multiplication and an addition are two.

TensorFlow's profiler counts the same, but nothing inside functions and loops, in which grouped convolutions and
recurrent layers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_ONE_AN_OUTPUT = frozenset(
    "Abs Add AddV2 BiasAdd Div DivNoNan Elu Erf Erfc Exp Expm1 LeakyRelu Log Log1p Maximum Minimum Mul Neg Pow RealDiv "
    "Reciprocal Relu Relu6 Rsqrt Selu Sigmoid Softplus Sqrt Square SquaredDifference Sub Tanh Xdivy Xlogy".split()
)
_ONE_AN_INPUT = frozenset("ArgMax ArgMin L2Loss Max Mean Min Prod Sum".split())
_PER_OUTPUT = {"FusedBatchNormV3": 2, "LogSoftmax": 5, "Softmax": 5}
"""Of the normalisation a scale and a shift, as in inference; of softmax what TensorFlow's profiler counts."""
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_LOOPS = ("While", "StatelessWhile")
_CHOICES = ("If", "StatelessIf")


def count_flops(function: Any) -> int:
    """Floating-point operations of one call of a concrete function.

    Products of matrices and convolutions count two for each multiplication; operations on single numbers, the bias
    among them, one; pooling one for each number that it looks at; what only moves, compares or selects numbers
    nothing. A loop over a sequence counts once for each element, any other loop once, and of two branches the larger
    one. An axis of unknown length counts as 1, as in a function of batch `[None, ...]` that is asked for the operations
    of one row; but in a graph that looks for places (`tf.where(mask)`) as many as there are to be found, the most that
    it may have to do.
    """
    return _of_graph(function.graph)


def _of_graph(graph: Any) -> int:
    """Of what the outputs of a function need; Keras also leaves a step of a recurrent layer there that never runs."""
    needed = {tensor.op for tensor in graph.outputs}
    waiting = list(needed)
    while waiting:
        found = {tensor.op for tensor in waiting.pop().inputs} - needed
        needed |= found
        waiting += found
    return sum(map(_of, needed))


def _of(operation: Any) -> int:
    kind = operation.type
    if kind in _CALLS:
        return _of_graph(_called(operation, "f"))
    if kind in _LOOPS:
        return _turns(operation) * _of_graph(_called(operation, "body"))
    if kind in _CHOICES:
        return max(_of_graph(_called(operation, branch)) for branch in ("then_branch", "else_branch"))
    if not operation.outputs or not operation.outputs[0].dtype.is_floating:
        return 0
    if kind in _PRODUCTS:
        return 2 * _PRODUCTS[kind](operation)
    if kind in _POOLS:
        return _size(operation.outputs[0]) * math.prod(operation.get_attr("ksize"))
    if kind in _ONE_AN_OUTPUT:
        return _size(operation.outputs[0])
    if kind == "AddN":
        return (len(operation.inputs) - 1) * _size(operation.outputs[0])
    if kind in _ONE_AN_INPUT:
        return _size(operation.inputs[0])
    return _PER_OUTPUT.get(kind, 0) * _size(operation.outputs[0])


def _turns(loop: Any) -> int:
    """A loop over a sequence, as recurrent layers write it, turns once for each of its elements `[T, ...]`."""
    sequences = [tensor.op.inputs[0] for tensor in loop.inputs if tensor.op.type == "TensorListFromTensor"]
    return max((_shape(sequence)[0] for sequence in sequences), default=1)


def _called(operation: Any, attribute: str) -> Any:
    """The graph that a call or a loop runs; with the shapes that it was traced with."""
    return operation.graph._get_function(operation.get_attr(attribute).name).graph


def _shape(tensor: Any) -> list[int]:
    if tensor.shape.rank is None:
        return [1]
    axes = tensor.shape.as_list()
    return [_unknown(tensor.graph) if axis is None else axis or 1 for axis in axes]


def _unknown(graph: Any) -> int:
    """The length of an axis that is known only when the graph runs."""
    masks = [operation.inputs[0].shape for operation in graph.get_operations() if operation.type == "Where"]
    return max((math.prod(axis or 1 for axis in mask.as_list()) for mask in masks if mask.rank is not None), default=1)


def _size(tensor: Any) -> int:
    return math.prod(_shape(tensor))


# ---- multiplications of products -----------------------------------------------------------------------------


def _of_matrices(operation: Any) -> int:
    """Each number of the result is a sum over the axis that both have in common."""
    transposed = "transpose_a" if operation.type == "MatMul" else "adj_x"
    common = _shape(operation.inputs[0])[-2 if operation.get_attr(transposed) else -1]
    return _size(operation.outputs[0]) * common


def _of_convolution(operation: Any) -> int:
    """The kernel is `[..., channels in of a group, channels out]`."""
    return _size(operation.outputs[0]) * math.prod(_shape(operation.inputs[1])[:-1])


def _of_depthwise(operation: Any) -> int:
    """The kernel is `[H, W, channels in, multiplier]`: each output channel reads one input channel."""
    return _size(operation.outputs[0]) * math.prod(_shape(operation.inputs[1])[:2])


def _of_transposed(operation: Any) -> int:
    """The kernel is `[H, W, channels out, channels in]`: each input number goes into H · W · channels out."""
    return _size(operation.inputs[2]) * math.prod(_shape(operation.inputs[1])[:-1])


def _of_einsum(operation: Any) -> int:
    """One multiplication for each combination of all axes, named or behind an ellipsis."""
    terms = operation.get_attr("equation").decode().partition("->")[0].split(",")
    axes: dict[str | int, int] = {}
    for term, tensor in zip(terms, operation.inputs, strict=True):
        lengths = _shape(tensor)
        for axis, length in zip(_axes(term, len(lengths)), lengths, strict=True):
            axes[axis] = max(length, axes.get(axis, 1))  # an axis of length 1 behind an ellipsis is repeated
    return math.prod(axes.values())


def _axes(term: str, rank: int) -> list[str | int]:
    """The names of the axes of an input; those that an ellipsis stands for are counted from their last, -1, as they
    are aligned."""
    before, ellipsis, after = term.partition("...")
    unnamed = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *range(-unnamed, 0), *after]


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "BatchMatMul": _of_matrices,
    "BatchMatMulV2": _of_matrices,
    "BatchMatMulV3": _of_matrices,
    "Conv2D": _of_convolution,
    "Conv2DBackpropInput": _of_transposed,
    "Conv3D": _of_convolution,
    "DepthwiseConv2dNative": _of_depthwise,
    "Einsum": _of_einsum,
    "MatMul": _of_matrices,
}
_POOLS = ("AvgPool", "MaxPool")
