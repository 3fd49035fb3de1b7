"""The denoiser D(x; sigma): SVD's UNet inside its EDM preconditioning and classifier-free guidance.

Everything around the UNet that depends on the noise level or on guidance is in here, so a sampler
step is one call, and a host in another language needs no diffusion arithmetic of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svd_engine.sampling import preconditioning


class Denoiser(nn.Module):
    """One half of guidance a call: D(x; sigma) for the conditioning it is given (guidance "single").

    `unet` is diffusers' UNetSpatioTemporalConditionModel, of any floating dtype; the arithmetic around
    it is float32.  Karras et al. 2022, eq. 7.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def forward(
        self, x: Tensor, sigma: Tensor, first_latent: Tensor, embedding: Tensor, time_ids: Tensor
    ) -> Tensor:
        # x [B,F,4,h,w], first_latent [B,4,h,w], embedding [B,1,D], time_ids [B,n] or [B,F,n] -> [B,F,4,h,w]
        return preconditioned(self.predict(x, sigma, first_latent, embedding, time_ids), x, sigma)

    def predict(
        self, x: Tensor, sigma: Tensor, first_latent: Tensor, embedding: Tensor, time_ids: Tensor
    ) -> Tensor:
        """v-prediction, float32 [B,F,4,h,w]."""
        told = self.unet_inputs(x, sigma, first_latent, embedding, time_ids)
        v: Tensor = self.unet(**told, return_dict=False)[0]
        return v.float()

    def unet_inputs(
        self, x: Tensor, sigma: Tensor, first_latent: Tensor, embedding: Tensor, time_ids: Tensor
    ) -> dict[str, Tensor]:
        """What the UNet is told; the first latent stands beside every frame, not scaled."""
        beside = first_latent[:, None].expand(-1, x.shape[1], -1, -1, -1)
        latent = torch.cat([x * preconditioning.c_in(sigma), beside], dim=2)  # [B, F, 8, h, w]
        return {
            "sample": latent.to(self.dtype),
            "timestep": preconditioning.c_noise(sigma),
            "encoder_hidden_states": embedding.to(self.dtype),
            "added_time_ids": time_ids,
        }

    def both_halves(
        self, x: Tensor, sigma: Tensor, first_latent: Tensor, embedding: Tensor, time_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same inputs for both halves, [2B, ...]: unconditional, conditional.

        Time ids of one video stay one row where the UNet adds one row to all.
        """
        one_row = len(time_ids) == 1 and getattr(self.unet, "one_row_for_all", False)
        return (
            torch.cat([x, x]),
            sigma,
            torch.cat([torch.zeros_like(first_latent), first_latent]),
            torch.cat([torch.zeros_like(embedding), embedding]),
            time_ids if one_row else torch.cat([time_ids, time_ids]),
        )


class GuidedDenoiser(Denoiser):
    """Both halves of guidance in one call of batch 2B, and their combination (guidance "batched").

    The halves are stacked [unconditional, conditional]; unconditional means a zero embedding and a
    zero first latent.  `guidance` [B,F] is the scale of each frame.  Ho & Salimans 2022, eq. 6.
    """

    def forward(  # type: ignore[override]  # one more input than the single form
        self,
        x: Tensor,
        sigma: Tensor,
        first_latent: Tensor,
        embedding: Tensor,
        time_ids: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        v = self.predict(*self.both_halves(x, sigma, first_latent, embedding, time_ids))
        return preconditioned(guided(v, guidance), x, sigma)


def guided(v: Tensor, guidance: Tensor | None) -> Tensor:
    """Both halves [2B,F,4,h,w] combined to [B,F,4,h,w] by scales [B,F]; without scales v as it is."""
    if guidance is None:
        return v
    unconditional, conditional = v.chunk(2)
    return unconditional + guidance[:, :, None, None, None] * (conditional - unconditional)


def preconditioned(v: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x; sigma) out of the v-prediction."""
    return v * preconditioning.c_out(sigma) + x * preconditioning.c_skip(sigma)
