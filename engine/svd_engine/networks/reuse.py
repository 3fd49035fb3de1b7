"""The denoiser in two: one that leaves a feature of its UNet, one that goes on from it.  See `spec.reuse`."""

from __future__ import annotations

from torch import Tensor, nn

from svd_engine.errors import BackendUnavailable
from svd_engine.networks.denoiser import Denoiser, guided, preconditioned
from svd_engine.networks.rewrites._forwards import UNetPath, adopt, obstacle_to_adoption


class ReusingDenoiser(Denoiser):
    """Full or shallow denoiser, by what it is given; both halves of guidance where it is given scales.

    kept: modules of the upward path that the shallow one runs.  Raises BackendUnavailable for a UNet that is
    not diffusers' own.
    """

    def __init__(self, unet: nn.Module, kept: int) -> None:
        super().__init__(unet)
        reason = obstacle_to_adoption(unet)
        if reason is not None:
            raise BackendUnavailable(
                "reuse", expected="diffusers' UNet", got=reason, remedy="Open the checkpoint without reuse."
            )
        adopt(unet)
        self.kept = kept

    def forward(  # type: ignore[override]  # two outputs, where there is no feature yet
        self,
        x: Tensor,  # [B, F, 4, h, w]
        sigma: Tensor,
        first_latent: Tensor,
        embedding: Tensor,
        time_ids: Tensor,
        guidance: Tensor | None = None,  # [B, F]
        feature: Tensor | None = None,  # [B, G, F, C, h', w'], G halves of guidance
    ) -> Tensor | tuple[Tensor, Tensor]:
        """D(x; sigma), and the feature in float32 unless there is one to go on from."""
        told = (x, sigma, first_latent, embedding, time_ids)
        halves = told if guidance is None else self.both_halves(*told)
        path = UNetPath(self.unet, **self.unet_inputs(*halves))
        if feature is not None:
            _, skips = path.down(self.kept - 1)
            inner = feature.transpose(0, 1).flatten(0, 2).to(self.dtype)  # [G*B*F, C, h', w']
        else:
            out, skips = path.down()
            inner = path.up(path.middle(out), skips, end=-self.kept)
        v = path.end(path.up(inner, skips, first=-self.kept)).float()
        denoised = preconditioned(guided(v, guidance), x, sigma)
        if feature is not None:
            return denoised
        return denoised, inner.unflatten(0, (-1, *x.shape[:2])).transpose(0, 1).float()
