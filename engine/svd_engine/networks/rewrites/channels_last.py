"""The same numbers with a pixel's channels side by side in memory: [N,C,h,w] stored as [N,h,w,C].

    element (n, c, y, x) at offset ((n h + y) w + x) C + c   instead of   ((n C + c) h + y) w + x

No arithmetic changes.  A convolution whose weight is stored so returns its output so, and everything
pointwise keeps the order, so converting the weights converts the network.  Then the tokens [N, h*w, C] of a
transformer and the frames [B, C, F, h*w] of a temporal convolution are views of the images, where in
diffusers' default order both are copies.  In diffusers: the weight of every Conv2d.
"""

from __future__ import annotations

import torch
from torch import nn

from svd_engine.networks.rewrites._places import Report


def apply(network: nn.Module) -> Report:
    done = 0
    for parameter in network.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            done += 1
    return Report(done)
