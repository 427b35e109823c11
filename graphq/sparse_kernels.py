"""2:4 sparse weights: which linear layers TensorRT's flag `SPARSE_WEIGHTS` is for.

These are facts of NVIDIA's documents and of its builder's logs; none of them was found by running.

- The pattern: for each output channel and each kernel position, two of every four input channels are zero (TensorRT Developer Guide,
  "Sparsity"), on GPUs of compute capability 8.0 and later, for products of half-precision or 8-bit operands.
- The operators: convolutions and fully connected layers. A MatMul or Gemm with a constant weight is one: the builder's own log lists
  both under "Layers eligible for sparse math" (NVIDIA/TensorRT issues 2169 and 4054). A MatMul therefore is not rewritten to a Gemm
  or a Conv; where others measured that (onnxsim pull request 1764, TensorRT 10.3 on an Orin), it made nothing faster.
- The sizes: NVIDIA's own pruning tool (apex, `contrib/sparsity/asp.py`) leaves weights dense unless their outputs are a multiple of 8
  and their inputs of 16, the alignment of tensor cores.
- What is picked: the builder times dense and sparse kernels and takes the faster one; layers of more than 256 input and output
  channels gain (NVIDIA/TensorRT issue 3849). With explicit Q/DQ, users of TensorRT 8.6 saw no sparse kernel (issue 4694, open).
"""

from __future__ import annotations

import numpy as np

from graphq import ir, linear, sparsity
from graphq.targets import Target


def obstacle(node: ir.Node, target: Target) -> str | None:
    """Why a linear `node` is not for the kernels of `target` for 2:4 sparse weights, as it stands; None if it is eligible.

    Kernels are picked by what is fastest where the engine is built, so an eligible layer may still run on a dense one.
    """
    if target.sparse is None:
        return f"{target.name} has none"
    if ir.attribute(node, "group", 1) != 1:
        return "no document says that they take grouped convolutions"
    weight = ir.constant(linear.weight_of(node))
    if weight is None:
        return "its weight is not a constant"
    outputs, inputs = weight.shape[linear.out_axis(node)], weight.shape[linear.in_axis(node)]
    if outputs % target.sparse[0] or inputs % target.sparse[1]:
        return f"its {outputs} outputs and {inputs} inputs are not multiples of {target.sparse[0]} and {target.sparse[1]}"
    is_sparse = sparsity.fullest(np.moveaxis(weight, linear.out_axis(node), 0), 4) <= 2
    return None if is_sparse else "more than two of four weights are not zero"
