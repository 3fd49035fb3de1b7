"""Full and shallow denoiser over the same UNet: see `spec.reuse`.

Letters in shapes: B videos, G halves of guidance in a call, F frames, C channels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svd_engine.errors import BackendUnavailable
from svd_engine.networks.denoiser import Denoiser, guided, preconditioned
from svd_engine.networks.rewrites._forwards import adopt, attends, obstacle_to_adoption, odd

Down = Callable[[Tensor], Tensor]
Up = Callable[[Tensor, list[Tensor]], Tensor]  # (x, skips), of which it takes the last


class FullDenoiser(Denoiser):
    """D(x; sigma), guided where it is given scales, and the feature [B,G,F,C,h,w] in float32.

    Raises BackendUnavailable for a UNet that is not diffusers' own.
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

    def forward(  # type: ignore[override]  # two outputs
        self,
        x: Tensor,
        sigma: Tensor,
        first_latent: Tensor,
        embedding: Tensor,
        time_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        told = self.told(x, sigma, first_latent, embedding, time_ids, guidance)
        path = UNetPath(self.unet, **told)
        out = path.begin()
        skips = [out]
        for down in path.down():
            out = down(out)
            skips.append(out)
        out = path.middle(out)
        ups = list(path.up())
        for up in ups[: -self.kept]:
            out = up(out, skips)
        feature = out  # [G*B*F, C, h, w]
        for up in ups[-self.kept :]:
            out = up(out, skips)
        state = feature.unflatten(0, (-1, *x.shape[:2])).transpose(0, 1)  # [B, G, F, C, h, w]
        return preconditioned(guided(path.end(out).float(), guidance), x, sigma), state.float()

    def told(
        self,
        x: Tensor,
        sigma: Tensor,
        first_latent: Tensor,
        embedding: Tensor,
        time_ids: Tensor,
        guidance: Tensor | None,
    ) -> dict[str, Any]:
        """What the UNet is given: one half of guidance, or both where there are scales."""
        if guidance is None:
            return self.unet_inputs(x, sigma, first_latent, embedding, time_ids)
        return self.unet_inputs(*self.both_halves(x, sigma, first_latent, embedding, time_ids))


class ShallowDenoiser(FullDenoiser):
    """D(x; sigma) with the deep part of the UNet as an earlier evaluation left it in `feature`."""

    def forward(  # type: ignore[override]  # one more input
        self,
        x: Tensor,
        sigma: Tensor,
        first_latent: Tensor,
        embedding: Tensor,
        time_ids: Tensor,
        feature: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        told = self.told(x, sigma, first_latent, embedding, time_ids, guidance)
        path = UNetPath(self.unet, **told)
        out = path.begin()
        skips = [out]
        for _, down in zip(range(self.kept - 1), path.down(), strict=False):
            out = down(out)
            skips.append(out)
        out = feature.transpose(0, 1).flatten(0, 2).to(self.dtype)  # [G*B*F, C, h, w]
        for up in list(path.up())[-self.kept :]:
            out = up(out, skips)
        return preconditioned(guided(path.end(out).float(), guidance), x, sigma)


class UNetPath:
    """The forward of `VideoUNet`, a resnet at a time: a step down leaves a skip, a step up takes the last."""

    def __init__(
        self,
        unet: Any,  # a VideoUNet
        sample: Tensor,  # [B, F, C, h, w]
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
    ) -> None:
        batch, frames = sample.shape[:2]
        self.unet, self.sample = unet, sample
        self.temb = unet.temb(sample, timestep, added_time_ids)
        self.indicator = sample.new_zeros(batch, frames)
        self.context = encoder_hidden_states
        self.sized = odd(sample, unet.num_upsamplers)

    def begin(self) -> Tensor:
        first: Tensor = self.unet.conv_in(self.sample.flatten(0, 1))  # [B*F, C, h, w] from here on
        return first

    def down(self) -> Iterator[Down]:
        for block in self.unet.down_blocks:
            for index in range(len(block.resnets)):
                yield partial(self._module, block, index)
            yield from block.downsamplers or ()

    def middle(self, x: Tensor) -> Tensor:
        out: Tensor = self.unet.mid_block(
            hidden_states=x,
            temb=self.temb,
            encoder_hidden_states=self.context,
            image_only_indicator=self.indicator,
        )
        return out

    def up(self) -> Iterator[Up]:
        for block in self.unet.up_blocks:
            for index in range(len(block.resnets)):
                yield partial(self._up, block, index)

    def end(self, x: Tensor) -> Tensor:
        unet = self.unet
        v = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        video: Tensor = v.unflatten(0, self.sample.shape[:2])
        return video

    def _up(self, block: Any, index: int, x: Tensor, skips: list[Tensor]) -> Tensor:
        x = self._module(block, index, torch.cat([x, skips.pop()], dim=1))
        if index + 1 == len(block.resnets):
            size = tuple(skips[-1].shape[2:]) if skips and self.sized else None
            for upsampler in block.upsamplers or ():
                x = upsampler(x, size)
        return x

    def _module(self, block: Any, index: int, x: Tensor) -> Tensor:
        out: Tensor = block.resnets[index](x, self.temb, image_only_indicator=self.indicator)
        if attends(block):
            (out,) = block.attentions[index](
                out,
                encoder_hidden_states=self.context,
                image_only_indicator=self.indicator,
                return_dict=False,
            )
        return out
