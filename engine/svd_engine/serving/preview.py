"""Latents to small pictures without the decoder: a linear map, fitted to the request's own photograph.

The VAE encoder has seen the photograph, so at every latent pixel both its four channels and the mean
colour of the pixels that they stand for are known: h x w equations for 5 x 3 unknowns, least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def fit(pixels: Tensor, latent: Tensor) -> Tensor:
    """Weights [5,3] from latent channels, and 1, to RGB in [-1, 1].  pixels [1,3,H,W], latent [1,4,h,w]."""
    height, width = latent.shape[-2:]
    colours = functional.adaptive_avg_pool2d(pixels[:1], (height, width))  # [1, 3, h, w]
    known = _with_one(latent[:1]).flatten(2)[0].T  # [h*w, 5]
    weights: Tensor = torch.linalg.lstsq(known.cpu(), colours.flatten(2)[0].T.cpu()).solution
    return weights


def project(latents: Tensor, weights: Tensor) -> Tensor:
    """Latents [F,4,h,w], in the encoder's scale, to pictures [F,3,h,w] in [0, 1], on the CPU.

    NaN becomes grey: the call itself ends with an error of its own.
    """
    colours = torch.einsum("fchw,cd->fdhw", _with_one(latents.cpu()), weights)
    return (colours.nan_to_num(0) / 2 + 0.5).clamp(0, 1)


def _with_one(latents: Tensor) -> Tensor:
    return torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
