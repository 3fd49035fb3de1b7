"""More memory than a call can take, known at once: of one that has as much, nothing needs to be counted.

Counting takes seconds.  This takes none: the widest place of each network, as often as it stands in memory,
with a third more, and all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil, prod

from svd_engine.bundle.costs import PlanCosts
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.request import Settings
from svd_engine.spec.precision import Precision
from svd_engine.spec.tensors import VALUE_BYTES
from svd_engine.spec.weights import COMPONENTS

Ceiling = Callable[[Settings, int], int]  # of a call and its number of videos: bytes beside the runtime's

SVD_PARAMETERS = 2_300_000_000  # the largest that there is, where no file says how many there are
SVD_CHANNELS = (128, 320)  # of the decoder at full size, of the UNet at an eighth; a bundle does not say
DECODER_TENSORS, DENOISER_TENSORS = 12, 30  # of so many channels; counted are 9 and 23
ATTENTION_CHANNELS = 64  # of a head
REST_BYTES = 2**26  # CLIP's activations, for each image


def of_checkpoint(checkpoint: Checkpoint, precision: Precision) -> Ceiling:
    """Raises what reading the files' headers raises; from the hub, files are fetched for that."""

    itemsize = VALUE_BYTES[precision.activations]

    @cache
    def weights() -> int:
        stated = [sum(prod(one.shape) for one in checkpoint.weights.stated(part)) for part in COMPONENTS]
        parameters = sum(stated) if all(stated) else SVD_PARAMETERS
        return 5 * parameters * itemsize // 4  # the VAE's may lie there twice

    def ceiling(settings: Settings, videos: int) -> int:
        channels = (
            max(ceil(c / 4**level) for level, c in enumerate(checkpoint.configs[part]["block_out_channels"]))
            for part in ("vae", "unet")
        )
        return weights() + itemsize * _values(settings, videos, *channels) + _rest(settings, videos)

    return ceiling


def of_graphs(bundle: Bundle, device: str, reusing: bool = False) -> Ceiling:
    """Of ONNX Runtime, whose CPU provider computes in float32 and holds the scores of attention.

    reusing: two denoisers are held, each with weights of its own.
    """
    manifest, on_cpu = bundle.manifest, device == "cpu"
    weights = sum(manifest.files[name].bytes for name in {entry.weights for entry in manifest.networks})
    widened = on_cpu and manifest.precision.weights != "float32"

    def ceiling(settings: Settings, videos: int) -> int:
        tokens = settings.height * settings.width // 64
        scores = 8 * videos * settings.frames * tokens**2 * SVD_CHANNELS[1] // ATTENTION_CHANNELS
        values = 4 * _values(settings, videos, *SVD_CHANNELS) + (scores if on_cpu else 0)
        copies = (4 if widened else 2) * (2 if reusing else 1)
        return weights * copies + values + _rest(settings, videos)

    return ceiling


def of_plans(bundle: Bundle, cost_of: PlanCosts) -> Ceiling:
    """Of TensorRT: everything that was built and can run, as its compiler said."""
    built = [e.spec for e in bundle.manifest.networks if cost_of.missing(e.spec) is None]

    def ceiling(settings: Settings, videos: int) -> int:
        costs = [cost_of(spec) for spec in built]
        return sum(cost.weight_bytes + cost.activation_bytes for cost in costs) + _rest(settings, videos)

    return ceiling


def _values(settings: Settings, videos: int, decoder: int, denoiser: int) -> int:
    """Of the network that takes most: one video is decoded at a time, and all are denoised."""
    pixels = settings.frames * settings.height * settings.width
    return max(
        DECODER_TENSORS * decoder * pixels, 2 * DENOISER_TENSORS * denoiser * videos * ceil(pixels / 64)
    )


def _rest(settings: Settings, videos: int) -> int:
    """Of the pipeline's own tensors, and of both encoders, whose activations are float32."""
    video = settings.frames * settings.height * settings.width
    image = settings.height * settings.width
    return videos * (REST_BYTES + 16 * video) + 4 * DECODER_TENSORS * 128 * image
