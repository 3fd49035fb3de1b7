"""The exporter's simplifications of a traced graph, less the patterns that find nothing in SVD's networks.

`torch.onnx.export(optimize=True)` tries some seventy patterns against every node, and one of them, two slices
as a split, looks through the whole graph each time: its time grows with the square of the graph.  The nine
here leave, node by node, what all would; a test compares.  The other passes are the same.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

PATTERNS = (
    *rules.mul_by_1_rule.commute(),
    rules.div_by_1_rule,
    rules.no_op_cast_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
)
ROUNDS = 2  # as the exporter has it


def simplify(model: ir.Model) -> None:
    """Edits a model as it was traced, in place."""
    common.InlinePass()(model)
    for _ in range(ROUNDS):
        optimizer.fold_constants(model)
        rewriter.RewritePass(PATTERNS)(model)
        common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
