"""Which ONNX operators, types and forms TensorRT's parser takes and its compiler builds.  Data only.

Sources: docs/operators.md of github.com/onnx/onnx-tensorrt, as of TensorRT 10.15; its docs/Changelog.md says
what came after 10.14 and is marked `SINCE` here; the opsets of 11 are from the ONNX Opset Guide in NVIDIA's
documentation, those of 10.14 follow from Attention.  Operators that the table has as unsupported are left
out.  The rules of Attention, of GroupNormalization and of cards are what TensorRT for RTX 1.7 does:
tests/export/test_tensorrt_table.py holds each against it.
"""

from __future__ import annotations

from typing import Literal

TensorRTRelease = Literal["10.14", "10.15", "11"]

OPSET_LIMITS: dict[TensorRTRelease, tuple[int, int]] = {  # oldest and newest opset
    "10.14": (9, 23),  # at least: Attention-23 came with it
    "10.15": (9, 24),
    "11": (9, 25),
}
SINCE: dict[str, TensorRTRelease] = {
    "RMSNormalization": "10.15",
    "RotaryEmbedding": "10.15",
    "TensorScatter": "10.15",
    "Swish": "11",
}

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
HALF = frozenset({"FLOAT", "FLOAT16"})
INTEGERS = frozenset({"INT32", "INT64"})
BOOL = frozenset({"BOOL"})
TENSORS = FLOATS | INTEGERS | BOOL | {"UINT8", "INT8"}  # DOUBLE is cast to FLOAT, if it can be
MAX_DIMENSIONS = 8

_ROWS: dict[frozenset[str], str] = {  # type of the data input: operators
    FLOATS: """
        Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip Conv
        ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool
        GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf
        LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool
        MeanVarianceNormalization PRelu ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal
        RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh
        Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Upsample
    """,
    HALF: """
        BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign
    """,
    FLOATS | INTEGERS: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max
        Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
        ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND
        Shrink Sign SpaceToDepth Sub Sum TopK
    """,
    FLOATS | INTEGERS | BOOL: """
        Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop
        OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
    FLOATS | INTEGERS | BOOL | {"UINT8"}: "Cast CastLike",
    FLOATS | {"INT32"}: "TensorScatter",
    BOOL: "And Not Or Xor",
    frozenset({"FLOAT"}): "STFT",
    frozenset({"INT8"}): "DequantizeLinear",
}
TYPES: dict[str, frozenset[str]] = {op: types for types, ops in _ROWS.items() for op in ops.split()}

# inputs that must be known when the engine is built: operator -> position
CONSTANT_INPUTS: dict[str, int] = {"Squeeze": 1, "Unsqueeze": 1, "CumSum": 1, "OneHot": 1} | {
    op: 1 for op in TYPES if op.startswith("Reduce")
}
# of Attention: q, k, v and a mask, of 3 or 4 dimensions, and none of the rest
ATTENTION_INPUTS = 4
ATTENTION_DIMENSIONS = (3, 4)
ATTENTION_WITHOUT = ("softmax_precision", "softcap")  # refused, softmax_precision with any value
# what the compiler has kernels of attention for; the others build in some surroundings, their scores written
FUSED_TYPES = frozenset({"FLOAT16", "BFLOAT16"})
FUSED_HEADS = range(9, 257)  # widths
NOT_ON: dict[str, tuple[str, ...]] = {"sm75": ("BFLOAT16",)}  # card: types that it does not have
ONE_OUTPUT = ("Attention", "LayerNormalization", "MaxPool")  # the others of these are not made


def supported(op: str, version: TensorRTRelease) -> bool:
    versions = list(OPSET_LIMITS)
    return op in TYPES and versions.index(version) >= versions.index(SINCE.get(op, versions[0]))
