"""The resize to the image encoder's size: diffusers' _resize_with_antialiasing, as one matrix an axis.

Letters in shapes: N images, H W pixels, S side of the image encoder's square input.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional


def resized(bands: Iterable[torch.Tensor], height: int, width: int, size: int) -> torch.Tensor:
    """`bands` of rows, [N, 3, rows, W] in [0, 1], H rows together, to [N, 3, S, S].

    The bicubic filter may overshoot that range.  Equals diffusers' _resize_with_antialiasing, a blur and then
    a bicubic filter.  Both are linear and separable, so one matrix an axis does both, at a fraction of the
    work on a large photograph.
    """
    rows, columns = _resize_weights(height, size).double(), _resize_weights(width, size).double()
    across = torch.cat(
        [(band.double() * 2.0 - 1.0) @ columns.T.to(band.device) for band in bands], dim=-2
    )  # [N, 3, H, S]
    filtered = rows.to(across.device) @ across  # in [-1, 1], as in training
    return ((filtered + 1.0) / 2.0).float()


def _resize_weights(source: int, target: int) -> torch.Tensor:
    """[target, source]: what each source pixel adds to each target pixel along one axis.

    If the axis shrinks by a factor f: a Gaussian of sigma (f - 1) / 2, cut off near 2 sigma, borders
    reflected.  Then torch's bicubic filter with aligned corners.
    """
    sigma = max((source / target - 1.0) / 2.0, 0.001)  # source pixels
    reach = int(max(4.0 * sigma, 3.0)) // 2 if source > target else 0  # source pixels to either side
    offsets = torch.arange(-reach, reach + 1)
    blur = torch.exp(-(offsets.float() ** 2) / (2.0 * sigma**2))
    blur = blur / blur.sum()  # [2 reach + 1]

    # A bicubic sample has four neighbours, and their indices differ modulo 4.  So torch's own filter, given
    # four combs with a one at every fourth place, shows the weight of each neighbour (beyond a border, 0).
    combs = (torch.arange(source) % 4 == torch.arange(4)[:, None]).float()[None, None]  # [1, 1, 4, source]
    shown = functional.interpolate(combs, size=(4, target), mode="bicubic", align_corners=True)[0, 0].T
    position = torch.arange(target, dtype=torch.float32) * ((source - 1) / max(target - 1, 1))
    taps = position.floor().long()[:, None] + torch.arange(-1, 3)  # [target, 4]

    index = (taps[:, :, None] + offsets).abs()  # [target, 4, 2 reach + 1], reflected at 0
    index = ((source - 1) - ((source - 1) - index).abs()).clamp_min(0)  # and at source - 1
    shares = shown.gather(1, taps % 4)[:, :, None] * blur
    return shares.new_zeros(target, source).scatter_add_(1, index.flatten(1), shares.flatten(1))
