"""Where the autoencoder starts: an encoder that is done, and a decoder that enlarges smoothly.

The encoder is set, not trained: three latents are the colours of each block of 8x8 pixels (brightness and two
differences), the fourth the change of brightness from its left to its right half.  The decoder starts as
three bilinear enlargements of the colours, and training adds what they cannot show.  Both are written into
the weights of the ordinary network: residual branches begin at zero, and where a group norm is in the way a
signal shares its group of three channels with K and -K, against which its mean is not lost.  (With 32 groups
that needs 96 channels beside the last norm; at 32 or 64 a picture's mean colour cannot pass.)
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

K = 6.0  # of the constants beside a signal; large against it
LINEAR = 8.0  # where SiLU is a straight line
SHARPEN = 0.2  # weight of the four neighbours that are taken away before enlarging

# two colour differences, left-right change, brightness; from r, g, b and their changes
TO_LATENT = torch.tensor(
    [
        [2.0, 0.0, -2.0, 0.0, 0.0, 0.0],
        [-2.0, 4.0, -2.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 2 / 3, 2 / 3, 2 / 3],
        [0.6, 0.6, 0.6, 0.0, 0.0, 0.0],
    ]
)


def encoded(pixels: Tensor) -> Tensor:
    """What the encoder computes, without it: [N, 3, H, W] in [-1, 1] -> [N, 4, H/8, W/8]."""
    left, right = F.avg_pool2d(pixels, (8, 4)).unflatten(3, (-1, 2)).unbind(4)
    parts = torch.cat([(left + right) / 2, right - left], 1)
    return torch.einsum("zc,nchw->nzhw", TO_LATENT, parts)


@torch.no_grad()
def set_weights(vae: AutoencoderKLTemporalDecoder) -> None:
    for module in vae.modules():
        if isinstance(module, (ResnetBlock2D, TemporalResnetBlock)):
            _zero(module.conv2)
        if isinstance(module, Attention):
            _zero(module.to_out[0])
    _set_encoder(vae)
    _set_decoder(vae)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    nn.init.zeros_(vae.decoder.time_conv_out.bias)


def _set_encoder(vae: AutoencoderKLTemporalDecoder) -> None:
    encoder = vae.encoder
    _zero(encoder.conv_in)
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _zero(resnet.conv_shortcut)
                for c in range(6):
                    resnet.conv_shortcut.weight[c, c] = 1
    first, second, last = [block.downsamplers[0].conv for block in list(encoder.down_blocks)[:3]]
    for conv in (first, second, last):  # taps 0 and 1 of 3: stride 2, padded on the right and below
        _zero(conv)
        for c in range(3):
            conv.weight[c, c, :2, :2] = 0.25
    for c in range(3):  # the last also keeps right less left
        last.weight[3 + c, c, :2, 0], last.weight[3 + c, c, :2, 1] = -0.5, 0.5
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    signals = [row for row in TO_LATENT]
    _beside_constants(shortcut, signals)
    weight, bias = _out_of_norm(encoder.conv_norm_out, len(signals))
    _zero(encoder.conv_out)
    _zero(vae.quant_conv)
    for i in range(4):
        encoder.conv_out.weight[i, :, 1, 1] = weight[i]
        encoder.conv_out.bias[i] = bias
        vae.quant_conv.weight[i, i] = 1


def _set_decoder(vae: AutoencoderKLTemporalDecoder) -> None:
    decoder = vae.decoder
    to_rgb = torch.linalg.pinv(TO_LATENT[[0, 1, 3], :3])  # [3, 3]: from the colour latents
    kernel = torch.tensor([[0, -1.0, 0], [-1, 4, -1], [0, -1, 0]]) * SHARPEN
    kernel[1, 1] += 1
    decoder.conv_in.weight[:3] = 0
    decoder.conv_in.bias[:3] = 0
    for latent, column in zip((0, 1, 3), to_rgb.unbind(1), strict=True):
        decoder.conv_in.weight[:3, latent] = column[:, None, None] * kernel
    smooth = torch.tensor([0.25, 0.5, 0.25])
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            shortcut = resnet.spatial_res_block.conv_shortcut
            if shortcut is not None:
                shortcut.weight[:3], shortcut.bias[:3] = 0, 0
                for c in range(3):
                    shortcut.weight[c, c] = 1
        for upsampler in block.upsamplers or ():
            upsampler.conv.weight[:3], upsampler.conv.bias[:3] = 0, 0
            for c in range(3):  # with the nearest neighbour before it: bilinear
                upsampler.conv.weight[c, c] = smooth[:, None] * smooth
    last = decoder.up_blocks[3].resnets[0].spatial_res_block.conv_shortcut
    _beside_constants(last, list(torch.eye(3)))
    weight, bias = _out_of_norm(decoder.conv_norm_out, 3)
    _zero(decoder.conv_out)
    for i in range(3):
        decoder.conv_out.weight[i, :, 1, 1] = weight[i]
        decoder.conv_out.bias[i] = bias


def _beside_constants(conv: nn.Conv2d, signals: list[Tensor]) -> None:
    """Signal i, a mix of the first input channels, to channel 3i; K and -K to the two after it."""
    for i, mix in enumerate(signals):
        conv.weight[3 * i : 3 * i + 3], conv.bias[3 * i : 3 * i + 3] = 0, 0
        conv.weight[3 * i, : len(mix), 0, 0] = mix
        conv.bias[3 * i + 1], conv.bias[3 * i + 2] = K, -K


def _out_of_norm(norm: nn.GroupNorm, count: int) -> tuple[Tensor, float]:
    """([count, channels], bias): a 1x1 convolution that, after norm and SiLU, gives the signals back.

    In a group (s, K, -K) the deviation is about K sqrt(2/3) and both s and K lose a third of the mean of s:
    s = deviation (norm(s) - norm(K)) + K.
    """
    deviation = K * (2 / 3) ** 0.5
    weight = torch.zeros(count, norm.num_channels)
    for i in range(count):
        norm.weight[3 * i : 3 * i + 2], norm.bias[3 * i : 3 * i + 2] = deviation, LINEAR
        weight[i, 3 * i], weight[i, 3 * i + 1] = 1, -1
    return weight, K


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
