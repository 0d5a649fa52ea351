"""What a network costs: parameters, and operations of one call."""

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .base import Base
from .network import predict


@torch.no_grad()
def num_macs(base: Base) -> int:
    """Count the multiply-accumulates of the network for one image, on the meta device; pipelines on pixels.

    They are those of convolutions and matrix products, half their floating-point operations.
    """
    network = copy.deepcopy(base.network).to("meta")
    x, t = torch.empty(1, *base.shape, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    condition = {} if base.encoders is None else {"class_labels": torch.zeros(1, dtype=torch.long, device="meta")}
    # Fused attention is none of the operations that torch counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        predict(base, network, x, t, **condition)
    return counter.get_total_flops() // 2
