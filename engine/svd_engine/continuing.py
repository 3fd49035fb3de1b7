"""A longer video out of a given one: its last frame becomes the photograph of the frames that follow.

The networks see that one frame: speed and direction of the motion before it are not known to them, and
every continuation starts from a picture that went through the decoder once more.  `Seam` says how it shows.

Letters in shapes: N videos, G frames of the clip, F frames of a call, H W pixels.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import fromarray

from svd_engine.engine import VideoEngine
from svd_engine.errors import SettingsError
from svd_engine.media.clip import read_video
from svd_engine.media.motion import optical_flow, psnr, speeds
from svd_engine.media.video import WritableFrames, as_bytes, to_uint8
from svd_engine.output import VideoOutput, present
from svd_engine.report import Seam
from svd_engine.values import one_of

PICTURES_OUT = ("pil", "np", "pt")  # output types; latents of a clip's frames there are none
LOOKED_AT = 25  # of the clip's last frames, for the medians
WITHOUT_PLACE = ("image", "fit", "return_dict")  # arguments of a call that have no place here


def continue_video(
    engine: VideoEngine, clip: str | Path | WritableFrames, *, output_type: str = "pil", **call: Any
) -> VideoOutput:
    """The clip's own frames [G], then F - 1 new ones that go on from its last frame.

        continue_video(engine, "video.mp4", generator=torch.manual_seed(1)).save("longer.mp4")

    clip: a path, as `read_video` takes it, or frames, as `write_video` takes them; two or more.  output_type:
    "pil", "np" or "pt".  call: arguments of the engine's call but for image, fit and return_dict; height and
    width are the clip's.  The first frame that the engine makes is the last one of the clip over again, and
    is left out.  `report.seams` has a `Seam` for each video, and `report.settings.frames` is F.

    Raises SettingsError for arguments that cannot be, ImageError for a clip that cannot be read, and what
    the engine's call raises.
    """
    one_of("output_type", output_type, PICTURES_OUT)
    if engine.model.orbits:
        raise SettingsError(
            "engine",
            expected="a model whose videos begin at the image, such as SVD",
            got=f"{engine.model.name}, whose videos end there",
            remedy="Use a checkpoint or a bundle of SVD.",
        )
    given = read_video(clip).frames if isinstance(clip, (str, Path)) else as_bytes(clip)  # [G, H, W, 3]
    check_continuable(given, call, engine.default.frames)
    height, width = given.shape[1:3]
    call |= {"height": height, "width": width}
    result = engine(fromarray(given[-1]), output_type="pt", **call)
    made = result.frames  # [N, F, 3, H, W]
    assert isinstance(made, torch.Tensor)  # output_type "pt"
    new = made[:, 1:].cpu()
    before = torch.from_numpy(given).permute(0, 3, 1, 2).float() / 255  # [G, 3, H, W]
    whole = torch.cat([before.expand(len(new), *before.shape), new], dim=1)  # [N, G + F - 1, 3, H, W]
    seams = [seam(given, to_uint8(video[:1])[0]) for video in new]
    return VideoOutput(present(whole, output_type), result.report.model_copy(update={"seams": seams}))


def check_continuable(given: np.ndarray, call: dict[str, Any], own_frames: int) -> None:
    """Raises SettingsError for a clip of one frame, and for arguments that contradict it or do nothing."""
    if len(given) < 2:
        raise SettingsError(
            "clip", expected="two frames or more", got="one", remedy="Call the engine with it as the image."
        )
    for name in WITHOUT_PLACE:
        if name in call:
            raise SettingsError(
                name,
                expected="nothing: the clip's last frame is the image, in the video's own size",
                got=repr(call[name]),
                remedy="Leave it out.",
            )
    for name, side in zip(("height", "width"), given.shape[1:3], strict=True):
        if call.get(name) not in (None, side):
            raise SettingsError(
                name,
                expected=f"the clip's, {side} pixels",
                got=str(call[name]),
                remedy="Leave it out, or resize the clip first.",
            )
    frames = call.get("num_frames")
    if (own_frames if frames is None else frames) == 1:
        raise SettingsError(
            "num_frames",
            expected="2 or more: the first is the clip's last frame over again",
            got="1",
            remedy="Generate more frames.",
        )


def seam(given: np.ndarray, first_new: np.ndarray) -> Seam:
    """Between the last frame of bytes [G, H, W, 3] and the first new one [H, W, 3].

    Optical flow is left out where OpenCV is not installed.
    """
    frames = (np.concatenate([given[-LOOKED_AT:], first_new[None]]) / 255).astype(np.float32)
    likeness = [psnr(a, b) for a, b in pairwise(frames)]
    measured = Seam(psnr=likeness[-1], median_psnr=float(np.median(likeness[:-1])))
    if find_spec("cv2") is None:
        return measured
    moves = speeds(optical_flow(frames))
    return measured.model_copy(update={"flow": float(moves[-1]), "median_flow": float(np.median(moves[:-1]))})
