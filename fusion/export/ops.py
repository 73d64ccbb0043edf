"""The TensorFlow operations that a served graph may hold: arithmetic, text, tables and control flow.

Everything a stock TensorFlow Serving runs and that touches neither files, network, clock nor Python. What
is not listed is refused by `fusion.export.savedmodel.lint`; extend a family here when a submodel needs more.
"""

from __future__ import annotations

_FLOW = """
    Const Placeholder PlaceholderWithDefault Identity IdentityN NoOp StopGradient PreventGradient Snapshot
    PartitionedCall StatefulPartitionedCall If StatelessIf While StatelessWhile Case StatelessCase Assert
    Select SelectV2 Where Bitcast Cast CheckNumerics EnsureShape
    TensorListConcatV2 TensorListElementShape TensorListFromTensor TensorListGather TensorListGetItem TensorListLength
    TensorListPushBack TensorListReserve TensorListResize TensorListSetItem TensorListStack EmptyTensorList
"""
_ARITHMETIC = """
    Abs Acos Acosh Add AddN AddV2 All Any ApproximateEqual ArgMax ArgMin Asin Asinh Atan Atan2 Atanh Ceil Cos Cosh
    ClipByValue Cumprod Cumsum CumulativeLogsumexp Digamma Div DivNoNan Einsum Elu Equal Erf Erfc Erfinv Exp Expm1 Floor
    FloorDiv FloorMod Greater GreaterEqual Inv Invert IsFinite IsInf IsNan L2Loss LeakyRelu Less LessEqual Lgamma Log
    Log1p LogicalAnd LogicalNot LogicalOr LogSoftmax MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3 Max Maximum Mean Min
    Minimum Mod Mul MulNoNan Neg NextAfter NotEqual Pow Prod RealDiv Reciprocal Relu Relu6 Rint Round Rsqrt Selu
    Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Square SquaredDifference Sub Sum Tan Tanh TruncateDiv
    TruncateMod Xdivy Xlog1py Xlogy BitwiseAnd BitwiseOr BitwiseXor LeftShift RightShift
    FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars FakeQuantWithMinMaxVarsPerChannel QuantizeAndDequantizeV2
    QuantizeAndDequantizeV3 QuantizeAndDequantizeV4
"""
_ARRAYS = """
    BatchToSpaceND Bincount DenseBincount BroadcastArgs BroadcastGradientArgs BroadcastTo Concat ConcatV2 DepthToSpace
    Diag DiagPart MatrixBandPart MatrixDiag MatrixDiagV3 MatrixDiagPartV3 MatrixSetDiagV3 DynamicPartition DynamicStitch
    ExpandDims Fill Gather GatherNd GatherV2 InTopKV2 InvertPermutation LinSpace OneHot OnesLike Pack Pad PadV2
    MirrorPad ParallelDynamicStitch Range Rank Reshape ResourceGather ResourceGatherNd Reverse ReverseSequence ReverseV2
    Roll ScatterNd SegmentMax SegmentMean SegmentMin SegmentProd SegmentSum Shape ShapeN Size Slice SpaceToBatchND
    SpaceToDepth Split SplitV Squeeze StridedSlice TensorScatterAdd TensorScatterMax TensorScatterMin TensorScatterSub
    TensorScatterUpdate Tile TopK TopKV2 Transpose Unique UniqueV2 UniqueWithCounts Unpack UnravelIndex
    UnsortedSegmentMax UnsortedSegmentMin UnsortedSegmentProd UnsortedSegmentSum UpperBound LowerBound ZerosLike
    SparseReorder SparseReshape SparseTensorDenseMatMul SparseToDense SparseSegmentMean SparseSegmentSqrtN
    SparseSegmentSum SparseFillEmptyRows RaggedRange RaggedTensorToTensor RaggedTensorToVariant RaggedGather
    RaggedTensorFromVariant
"""
# The Cudnn operations stand in the branch of stock LSTM and GRU layers that a server with a GPU chooses.
_NETWORKS = """
    AvgPool AvgPool3D BiasAdd BiasAddV1 Conv1D Conv2D Conv3D Conv2DBackpropInput DepthwiseConv2dNative FusedBatchNorm
    FusedBatchNormV2 FusedBatchNormV3 LRN MaxPool MaxPool3D MaxPoolV2 ResizeBilinear ResizeBicubic ResizeArea
    ResizeNearestNeighbor CropAndResize AdjustContrastv2 AdjustHue AdjustSaturation RGBToHSV HSVToRGB
    BlockLSTMV2 GRUBlockCell LSTMBlockCell CudnnRNN CudnnRNNV2 CudnnRNNV3
"""
_TEXT = """
    AsString Base64 DecodeBase64 EncodeBase64 RegexFullMatch RegexReplace StaticRegexFullMatch StaticRegexReplace
    ReduceJoin StringFormat StringJoin StringLength StringLower StringNGrams StringSplit StringSplitV2 StringStrip
    StringToHashBucket StringToHashBucketFast StringToHashBucketStrong StringToNumber StringUpper Substr
    UnicodeDecode UnicodeDecodeWithOffsets UnicodeEncode UnicodeScript UnicodeTranscode UnsortedSegmentJoin
"""
_STATE = """
    VarHandleOp ReadVariableOp AssignVariableOp DisableCopyOnRead VarIsInitializedOp VariableShape
    HashTableV2 MutableHashTableV2 AnonymousHashTable AnonymousMutableHashTable LookupTableExportV2 LookupTableFindV2
    LookupTableImportV2 LookupTableInsertV2 LookupTableSizeV2 InitializeTableV2
"""
SERVED_OPERATIONS = frozenset(" ".join((_FLOW, _ARITHMETIC, _ARRAYS, _NETWORKS, _TEXT, _STATE)).split())
