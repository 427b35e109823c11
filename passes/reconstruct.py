"""reconstruct: learn the codes of weights, the steps of activations and the biases of a quantized model, block by block.

Each block is fitted, by gradient descent, to what the float model computes, from what the blocks before it now make of the data.
It stands behind whatever quantizes: `round`, `quantize-weights`, `insert-qdq`. Needs torch (extra `torch`), on a GPU if there is one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graphq import ir
from graphq.exclude import require_matches
from graphq.passes import _reconstruct
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class Reconstruct(Pass):
    """Fits the blocks of a quantized model to the float model.

    Attributes:
        steps: Steps of Adam for each block.
        budget_s: Seconds that the pass may take, shared out among the blocks; what it does then depends on the machine.
    """

    name: ClassVar[str] = "reconstruct"
    needs_data: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False
