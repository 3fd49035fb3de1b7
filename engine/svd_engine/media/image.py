"""Pixels in: from a picture file, PIL images or a tensor to what the image encoder and the VAE read.

Knows picture formats, value ranges and size limits.  Must not know networks or GPUs.

Letters in shapes: N images, H W pixels, S side of the image encoder's square input.  The arithmetic is that
of diffusers' StableVideoDiffusionPipeline.  Where diffusers crashes or guesses, this file decides:

* PIL images may have any mode with a known range, and those of one list any sizes.  Transparency is laid over
  white, colour profiles are ignored.
* A tensor of floats must lie in [0, 1]; one of uint8 holds bytes.  diffusers takes one with a negative value
  to be in [-1, 1] already, on the way to the VAE though not to the image encoder.
* A tensor that does not have the image encoder's size is resized for it like a PIL image.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from svd_engine.errors import ImageError, SettingsError
from svd_engine.values import FITS, Fit, as_path, one_of

if TYPE_CHECKING:
    import torch

    Images = Image.Image | Sequence[Image.Image] | torch.Tensor

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # pixels; JPEG's own limit
OBJECT_SHARE = 0.917  # of a square, that an object is to take: image_frame_ratio of sgm's 4D script
BAND = 2**21  # pixels that are converted at once, so that memory stays a small multiple of the picture
# What Pillow may try on a file.  One of its other formats, EPS, starts an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")


def load_image(path: str | Path, *, transparency: bool = False) -> Image.Image:
    """Read a picture file into an RGB image, upright (EXIF orientation applied).  The first frame of several.

    16-bit grey is scaled to 8 bits, transparency is laid over white, palettes and CMYK are converted.
    transparency: keep it instead, in an RGBA image, where the picture has any.
    Raises ImageError if there is no regular file, or it is empty, in none of FORMATS, damaged, of unknown
    range (floats), or larger than MAX_PIXELS or MAX_SIDE, by its header, before anything is decoded;
    SettingsError for what is no path.
    """
    path, name = as_path("image", path), f"image {path}"
    if not os.path.isfile(path):
        got = "a folder or a device" if os.path.exists(path) else "nothing at that path"
        raise ImageError(name, expected="a picture file", got=got, remedy="Give the path of a picture.")
    if os.path.getsize(path) == 0:
        raise _empty(name)
    return _read(path, name, transparency)


def decode_image(content: bytes, *, transparency: bool = False) -> Image.Image:
    """As `load_image`, of a picture file's content.  Raises ImageError for the same faults."""
    if not content:
        raise _empty("image")
    return _read(io.BytesIO(content), "image", transparency)


def _read(file: str | Path | io.BytesIO, name: str, transparency: bool) -> Image.Image:
    Image.init()
    formats = [known for known in FORMATS if known in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # The limits below are stricter: Pillow warns from 89 and stops at 179 million pixels.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                    raise _too_large(name, f"{image.width} x {image.height}")
                ImageOps.exif_transpose(image, in_place=True)
                if transparency and image.has_transparency_data:
                    return image.convert("RGBA")
                return _to_rgb(image, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, "more than Pillow opens") from error
    except Exception as error:  # a decoder that meets damage raises whatever its parser stumbled over
        raise ImageError(
            name,
            expected=f"a whole picture in one of the formats {', '.join(formats)}",
            got=f"{type(error).__name__}: {error}",
            remedy="Copy the file again, or convert it to PNG or JPEG.",
        ) from error


def fitted(images: Images, height: int, width: int, fit: Fit) -> list[Image.Image] | torch.Tensor:
    """Bring images to the aspect ratio height : width, without resizing them yet.

    fit: "crop" cuts the same off two opposite sides, "pad" adds black there, and "stretch" changes nothing:
    the resize will distort what has another aspect.  Tensors come back as [N, 3, H, W] in [0, 1], PIL images
    as RGB.  Raises SettingsError for another `fit`, type, shape or range, and ImageError for a "pad" beyond
    MAX_PIXELS.
    """
    import torch
    from torch.nn import functional

    one_of("fit", fit, FITS)
    _check_size(height, width)
    given = _unit_tensor(images) if isinstance(images, torch.Tensor) else _rgb_images(images)
    if fit == "stretch":
        return given
    if isinstance(given, torch.Tensor):
        down, across = given.shape[-2:]
        left, top, right, bottom = _window(across, down, height, width, fit)
        return functional.pad(given, (-left, right - across, -top, bottom - down))  # less than 0 crops
    # beyond its border a PIL image is black
    return [image.crop(_window(*image.size, height, width, fit)) for image in given]


def objects_on_white(images: Image.Image | Sequence[Image.Image], side: int) -> list[Image.Image]:
    """What is not transparent of each picture, centred on a white square of `side` pixels; RGB.

    The longer side of its bounding box takes OBJECT_SHARE of the square.  A picture without transparency
    stays as it is.  Cropped, resized and laid over white as sgm's `simple_video_sample.py` does, in float64
    cut to 8 bits.  Raises ImageError for a picture that is transparent throughout, and for a square beyond
    MAX_PIXELS.
    """
    _check_size(side)
    given: Sequence[Image.Image] = images if isinstance(images, (list, tuple)) else (images,)
    return [
        _object_on_white(image, side)
        if isinstance(image, Image.Image) and image.has_transparency_data
        else image
        for image in given
    ]


def _object_on_white(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ImageError(
            "image",
            expected="an object, where the picture is not transparent",
            got="a picture that is transparent throughout",
            remedy="Pass a picture with an object, or one without an alpha channel.",
        )
    wide, high = box[2] - box[0], box[3] - box[1]
    square = int(max(wide, high) / OBJECT_SHARE)
    if square**2 > MAX_PIXELS:
        raise _too_large("square around the object", f"{square} x {square}")
    canvas = Image.new("RGBA", (square, square))
    canvas.paste(image.crop(box), (square // 2 - wide // 2, square // 2 - high // 2))
    values = np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS)) / 255.0  # [side, side, 4]
    colour, alpha = values[..., :3], values[..., 3:]
    return Image.fromarray(((colour * alpha + (1 - alpha)) * 255).astype(np.uint8))


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop the centre of `image` to the aspect ratio height : width, without resizing.  RGB.

    Resizing the result to height x width then neither distorts it nor leaves a border.
    Raises SettingsError if a size is not positive or `image` is not a PIL image.
    """
    _check_size(height, width)
    (image,) = _rgb_images([image])
    return image.crop(_window(*image.size, height, width, "crop"))


def _window(across: int, down: int, height: int, width: int, fit: Fit) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the aspect height : width: inside the image, or around it to pad."""
    side = min if fit == "crop" else max
    wide = side(across, max(1, round(down * width / height)))
    high = side(down, max(1, round(across * height / width)))
    if fit == "pad" and wide * high > MAX_PIXELS:
        raise _too_large("padded image", f"{wide} x {high}")
    left, top = (across - wide) // 2, (down - high) // 2
    return left, top, left + wide, top + high


def to_vae_pixels(images: Images, height: int, width: int) -> torch.Tensor:
    """Resize to what the VAE encoder reads: [N, 3, height, width] float32 in [-1, 1].

    `images` is a PIL image, a list of them, or a tensor [N, 3, H, W] or [3, H, W] in [0, 1] or of bytes.  PIL
    images are resized with Lanczos, tensors by nearest neighbour (diffusers' VideoProcessor.preprocess); the
    aspect ratio is not kept.  Raises SettingsError for another type, shape or range.
    """
    import torch
    from torch.nn import functional

    _check_size(height, width)
    if isinstance(images, torch.Tensor):
        pixels = functional.interpolate(_unit_tensor(images), size=(height, width))
    else:
        lanczos = Image.Resampling.LANCZOS
        pixels = torch.cat([_from_rgb(i.resize((width, height), lanczos)) for i in _rgb_images(images)])
    return pixels * 2.0 - 1.0  # [N, 3, height, width]


def to_clip_pixels(images: Images, size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Resize and normalise to what the image encoder reads: [N, 3, size, size] float32.

    `images` as for `to_vae_pixels`; `mean` and `std` are CLIP's, per channel, for values in [0, 1].  PIL
    images are blurred and resized, and so are tensors unless they are size x size already (diffusers'
    StableVideoDiffusionPipeline._encode_image).  Raises SettingsError as `to_vae_pixels` does.
    """
    import torch

    from svd_engine.media.antialiasing import resized

    _check_size(size)
    if not isinstance(images, torch.Tensor):
        resized_each = [
            resized((_from_rgb(band) for band in _bands(i)), i.height, i.width, size)
            for i in _rgb_images(images)
        ]
        pixels = torch.cat(resized_each)
    else:
        pixels = _unit_tensor(images)
        if pixels.shape[-2:] != (size, size):
            height, width = pixels.shape[-2:]
            band = max(1, BAND // (len(pixels) * width))
            pixels = resized(pixels.split(band, dim=-2), height, width, size)
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A PIL image of any mode to RGB, band by band; `name` is for the error."""
    rgb = Image.new("RGB", image.size)
    top = 0
    for band in _bands(image):
        rgb.paste(_band_to_rgb(band, name), (0, top))
        top += band.height
    return rgb


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """The rows of an image from top to bottom, about BAND pixels at a time."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _band_to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; in mode I from some formats and versions of Pillow
        grey = np.asarray(image).astype(np.int32)
        if grey.min() >= 0 and grey.max() <= 65535:
            image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    if image.mode in ("I", "F"):
        raise ImageError(
            name,
            expected="8 or 16 bits a pixel",
            got=f"32-bit values of unknown range (mode {image.mode})",
            remedy="Scale it to 8 bits.",
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _from_rgb(image: Image.Image) -> torch.Tensor:
    """[1, 3, H, W] float32 in [0, 1]."""
    import torch

    values = np.asarray(image, dtype=np.float32) / 255.0  # [H, W, 3]
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def _rgb_images(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    given = images if isinstance(images, (list, tuple)) else [images]
    rgb = [
        image if image.mode == "RGB" and not image.has_transparency_data else _to_rgb(image, "image")
        for image in given
        if isinstance(image, Image.Image) and all(image.size)
    ]
    if not rgb or len(rgb) < len(given):
        raise SettingsError(
            "image",
            expected="a PIL image, a list of at least one, or a tensor; nothing empty",
            got=", ".join(type(image).__name__ for image in given) or "an empty list",
            remedy="Read a path with load_image; combine several tensors with torch.stack.",
        )
    return rgb


def _unit_tensor(images: torch.Tensor) -> torch.Tensor:
    """Check a tensor in [0, 1], or of bytes, and give it as [N, 3, H, W] float32 in [0, 1]."""
    import torch

    batch = images[None] if images.ndim == 3 else images
    holds_pixels = images.is_floating_point() or images.dtype == torch.uint8
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel() or not holds_pixels:
        raise SettingsError(
            "image tensor",
            expected="floats in [0, 1], or uint8, in the shape [N, 3, H, W] or [3, H, W], nothing empty",
            got=f"{images.dtype} {list(images.shape)}",
            remedy="Put the channels before height and width with permute; convert other numbers to float.",
        )
    if images.dtype == torch.uint8:
        return batch.float() / 255
    batch = batch.detach().float()
    low, high = batch.aminmax()
    if not (low >= 0 and high <= 1):  # NaN too
        raise SettingsError(
            "image tensor",
            expected="values in [0, 1]",
            got=f"values from {low:.9g} to {high:.9g}",  # 9 digits tell any two float32 apart
            remedy="Map [-1, 1] with x / 2 + 0.5; cut off what a resize overshot with clamp(0, 1).",
        )
    return batch


def _empty(name: str) -> ImageError:
    return ImageError(name, expected="a picture", got="an empty file", remedy="Copy the file again.")


def _too_large(name: str, got: str) -> ImageError:
    expected = f"at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side"
    return ImageError(name, expected=expected, got=got, remedy="Shrink it first.")


def _check_size(*sizes: int) -> None:
    if not all(isinstance(pixels, int) and pixels > 0 for pixels in sizes):
        raise SettingsError(
            "size",
            expected="positive whole numbers of pixels",
            got=" x ".join(map(str, sizes)),
            remedy="Give the size of the video, such as 576 x 1024.",
        )
