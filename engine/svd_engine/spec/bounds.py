"""Ranges of the numbers that a bundle may hold: wide enough for any machine to come, and never a surprise.

Pydantic reads them, and writes them into the JSON schema of a manifest.  Knows no other file.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Frames = Annotated[int, Field(ge=1, le=1024)]
Steps = Annotated[int, Field(ge=1, le=10_000)]  # of denoising
Pixels = Annotated[int, Field(ge=1, le=16_384)]  # height or width of a video
Batch = Annotated[int, Field(ge=1, le=64)]  # videos per call
ClipPixels = Annotated[int, Field(ge=1, le=2048)]  # height and width of the image encoder's input
Channels = Annotated[int, Field(ge=1, le=65_536)]  # of an embedding
LatentChannels = Annotated[int, Field(ge=1, le=64)]
PixelScale = Annotated[int, Field(ge=1, le=1024)]  # pixels per pixel of something smaller
Kept = Annotated[int, Field(ge=2, le=1024)]  # resnets of a UNet's upward path
SegmentNumber = Annotated[int, Field(ge=0, le=1024)]  # of a streamed decoder
Side = Annotated[int, Field(ge=1, le=65_536)]  # one axis of a tensor
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bytes = Annotated[int, Field(ge=0, le=2**50)]
Opset = Annotated[int, Field(ge=1, le=1000)]
OptimizationLevel = Annotated[int, Field(ge=0, le=5)]  # TensorRT's
CapabilityNumber = Annotated[int, Field(ge=0, le=999)]  # major or minor number of a CUDA compute capability

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NoiseLevel = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]  # sigma; the data has deviation 1
Rho = Annotated[float, Field(ge=0.1, le=1000, allow_inf_nan=False)]  # sigma ** (1 / rho) stays finite
Divisor = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]  # of pixels or latents
GuidanceScale = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
ChannelMean = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]

# of one line that is printed: no control characters, which a terminal would obey
Text = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

VIDEO_PIXELS = 2**30  # of all frames and videos of one call: 1024 frames of 1024x1024
TENSOR_VALUES = 2**31  # of one input or output of a network
