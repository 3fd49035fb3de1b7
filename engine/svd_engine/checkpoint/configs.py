"""The JSON configs of a diffusers SVD checkpoint: reads them, refuses what is not SVD, makes a `Model`.

Knows nothing of weights or of where the folder came from.  A key that is absent means diffusers'
default, as it does there; where SVD needs another value than the default, the key must be there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svd_engine.checkpoint import sv3d_port
from svd_engine.checkpoint.random_weights import sv3d_generation
from svd_engine.errors import CheckpointError, SettingsError
from svd_engine.spec.bounds import (
    ChannelMean,
    Channels,
    ClipPixels,
    Divisor,
    Frames,
    LatentChannels,
    NoiseLevel,
    Steps,
)
from svd_engine.spec.conditioning import conditioning_of, svd_conditioning
from svd_engine.spec.model import Architecture, GuiderName, Model

PIPELINE = "StableVideoDiffusionPipeline"
INDEX = "model_index.json"
FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "image_encoder": "image_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "feature_extractor": "feature_extractor/preprocessor_config.json",
}
OPTIONAL = {"generation": "generation_config.json"}  # what a call defaults to; those published have none
SVD_SIZE = (576, 1024)  # pixels; no config says it, diffusers' pipeline has it as its default

_TIME = "projection_class_embeddings_input_dim"

Configs = Mapping[str, Mapping[str, Any]]  # by the keys of FILES and OPTIONAL
AtLeastOne = Annotated[int, Field(ge=1)]
LatentPixels = Annotated[int, Field(ge=1, le=512)]  # height or width
Levels = Annotated[list[AtLeastOne], Field(min_length=1, max_length=6)]  # one per resolution
Rgb = Annotated[list[ChannelMean], Field(min_length=3, max_length=3)]


class _Config(BaseModel):
    """The keys that this project depends on; the others go to the network's class untouched."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _UNet(_Config):
    class_name: Literal["UNetSpatioTemporalConditionModel"] = Field(alias="_class_name")
    in_channels: AtLeastOne
    out_channels: AtLeastOne
    block_out_channels: Levels
    layers_per_block: AtLeastOne | list[AtLeastOne] = 2  # resnets of a downward block; diffusers' default
    cross_attention_dim: AtLeastOne
    addition_time_embed_dim: AtLeastOne
    projection_class_embeddings_input_dim: AtLeastOne
    num_frames: Frames
    sample_size: Annotated[list[LatentPixels], Field(min_length=2, max_length=2)] | int | None = None


class _Vae(_Config):
    class_name: Literal["AutoencoderKLTemporalDecoder", "AutoencoderKL"] = Field(alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: LatentChannels
    block_out_channels: Levels
    layers_per_block: AtLeastOne = 1  # resnets of a level of the encoder; diffusers' default
    scaling_factor: Divisor
    use_quant_conv: Literal[True] = True  # these four only AutoencoderKL has
    use_post_quant_conv: Literal[True] = True
    shift_factor: None = None
    latents_mean: None = None


class _ImageEncoder(_Config):
    architectures: list[Literal["CLIPVisionModelWithProjection"]]
    image_size: ClipPixels
    projection_dim: Channels


class _Scheduler(_Config):
    """What makes `EulerDiscreteScheduler` the sampler of sampling/.

    Its initial noise is sqrt(sigma_max^2 + 1) only for timestep_spacing "leading"; the noise level goes
    into the network as 0.25 ln sigma only for "continuous" and "v_prediction".
    """

    class_name: Literal["EulerDiscreteScheduler"] = Field(alias="_class_name")
    prediction_type: Literal["v_prediction"]
    timestep_type: Literal["continuous"]
    timestep_spacing: Literal["leading"]
    use_karras_sigmas: Literal[True]
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    final_sigmas_type: Literal["zero"] = "zero"
    sigma_min: NoiseLevel
    sigma_max: NoiseLevel


class _FeatureExtractor(_Config):
    image_mean: Rgb
    image_std: Annotated[list[Divisor], Field(min_length=3, max_length=3)]
    crop_size: AtLeastOne | dict[str, AtLeastOne]  # older transformers wrote one number


class _Generation(_Config):
    """Guidance and steps that a checkpoint recommends.  A misspelt key is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    min_guidance_scale: float = Model.min_guidance_scale
    max_guidance_scale: float = Model.max_guidance_scale
    guider: GuiderName = Model.guider
    num_inference_steps: Steps = Model.steps


def read_configs(folder: Path) -> Configs:
    """The five configs of a diffusers folder, and those of OPTIONAL that it has.

    Raises CheckpointError for a missing or unreadable file, and for another family of pipeline.
    """
    family = read_json(folder / INDEX).get("_class_name")
    if family not in (PIPELINE, sv3d_port.PORT_PIPELINE):
        raise CheckpointError(
            str(folder / INDEX),
            expected=f"_class_name {PIPELINE}, or {sv3d_port.PORT_PIPELINE} of SV3D",
            got=str(family),
            remedy="This engine runs Stable Video Diffusion only; pass an SVD checkpoint.",
        )
    there = {part: file for part, file in OPTIONAL.items() if (folder / file).exists()}
    configs = {part: read_json(folder / file) for part, file in (FILES | there).items()}
    return configs | {"unet": sv3d_port.unet_config(configs["unet"])}


def describe(name: str, where: str, configs: Configs, *, random_weights: bool = False) -> Model:
    """The `Model` of these configs; `where` stands in messages before the file's name.

    Height and width are the UNet's sample_size where that is a pair of latent pixels, else 576x1024:
    SVD's own config holds a single 96, which is not its size.  What a call defaults to is the family's where
    the configs say nothing of it.
    Raises CheckpointError that names file, key, expected and got.
    """
    unet = _parse(_UNet, "unet", where, configs)
    vae = _parse(_Vae, "vae", where, configs)
    clip = _parse(_ImageEncoder, "image_encoder", where, configs)
    scheduler = _parse(_Scheduler, "scheduler", where, configs)
    extractor = _parse(_FeatureExtractor, "feature_extractor", where, configs)

    c, clip_size = vae.latent_channels, clip.image_size
    each, told = unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim
    conditioning = conditioning_of(each, told)
    if conditioning is None:
        raise _refused(
            f"{where}/{FILES['unet']}, key {_TIME}",
            expected=f"{3 * each}, {each} or {5 * each} (3 addition_time_embed_dim in SVD, 1 in SV3D_u, "
            "5 in SV3D_p)",
            got=str(told),
        )
    orbits = conditioning != svd_conditioning(each)
    recommended = (sv3d_generation() if orbits else {}) | dict(configs.get("generation", {}))
    generation = _parse(_Generation, "generation", where, {"generation": recommended})
    crop = extractor.crop_size
    crops = set(crop.values()) if isinstance(crop, dict) else {crop}
    for part, key, got, expected, why in (
        ("unet", "in_channels", unet.in_channels, 2 * c, "twice the VAE's latent_channels"),
        ("unet", "out_channels", unet.out_channels, c, "the VAE's latent_channels"),
        (
            "unet",
            "cross_attention_dim",
            unet.cross_attention_dim,
            clip.projection_dim,
            "CLIP's projection_dim",
        ),
        ("feature_extractor", "crop_size", crops, {clip_size}, "CLIP's image_size"),
    ):
        if got != expected:
            raise _refused(f"{where}/{FILES[part]}, key {key}", expected=f"{expected} ({why})", got=str(got))
    if scheduler.sigma_max <= scheduler.sigma_min:
        raise _refused(
            f"{where}/{FILES['scheduler']}, key sigma_max",
            expected=f"more than sigma_min, {scheduler.sigma_min}",
            got=str(scheduler.sigma_max),
        )

    vae_scale = 2 ** (len(vae.block_out_channels) - 1)
    height, width = SVD_SIZE
    if isinstance(unet.sample_size, list):
        height, width = (side * vae_scale for side in unet.sample_size)
    return Model(
        name=name,
        architecture=Architecture(
            clip_size=clip.image_size,
            embedding_dim=clip.projection_dim,
            latent_channels=c,
            vae_scale=vae_scale,
            size_multiple=vae_scale * 2 ** (len(unet.block_out_channels) - 1),
            conditioning=conditioning,
        ),
        frames=unet.num_frames,
        height=height,
        width=width,
        sigma_min=scheduler.sigma_min,
        sigma_max=scheduler.sigma_max,
        latent_scale=vae.scaling_factor,
        clip_mean=_rgb(extractor.image_mean),
        clip_std=_rgb(extractor.image_std),
        random_weights=random_weights,
        min_guidance_scale=generation.min_guidance_scale,
        max_guidance_scale=generation.max_guidance_scale,
        guider=generation.guider,
        steps=generation.num_inference_steps,
        orbits=orbits,
    )


_C = TypeVar("_C", bound=_Config)


def unet_levels(configs: Configs) -> tuple[list[int], int]:
    """Channels of the UNet by level, the outermost first, and resnets of a downward block.

    Raises CheckpointError where levels differ in these.
    """
    unet = _UNet.model_validate(configs["unet"])
    given = unet.layers_per_block
    layers = set(given if isinstance(given, list) else [given])
    if len(layers) > 1:
        raise CheckpointError(
            "reuse: layers_per_block of the UNet",
            expected="the same at every level",
            got=repr(given),
            remedy="Open the checkpoint without reuse.",
        )
    return list(unet.block_out_channels), layers.pop()


def vae_levels(configs: Configs) -> tuple[list[int], int]:
    """Channels of a temporal VAE by level, the outermost first, and resnets of a level of its encoder.

    Raises SettingsError for a VAE of single images, whose frames need no streamed decoder.
    """
    vae = _Vae.model_validate(configs["vae"])
    if vae.class_name != "AutoencoderKLTemporalDecoder":
        raise SettingsError(
            "stream decoder",
            expected="a checkpoint whose decoder sees all frames, as SVD's",
            got=f"{vae.class_name}, which decodes each frame alone",
            remedy="Leave it out: decode_chunk_size gives the same video in less memory.",
        )
    return list(vae.block_out_channels), vae.layers_per_block


def _parse(kind: type[_C], part: str, where: str, configs: Configs) -> _C:
    try:
        return kind.model_validate(configs[part])
    except ValidationError as error:
        first = error.errors()[0]
        missing = first["type"] == "missing"
        expected = "a value, which SVD needs" if missing else first["msg"].removeprefix("Input should be ")
        got = "no such key" if missing else repr(first["input"])
        key = first["loc"][0]
        if first["type"] == "extra_forbidden":
            expected, got = f"one of {', '.join(kind.model_fields)}", "a key that is none of them"
        file = (FILES | OPTIONAL)[part]
        raise _refused(f"{where}/{file}, key {key}", expected=expected, got=got) from error


def _refused(what: str, *, expected: str, got: str) -> CheckpointError:
    remedy = "Pass an unmodified SVD checkpoint; this engine's arithmetic holds for SVD's configuration only."
    return CheckpointError(what, expected=expected, got=got, remedy=remedy)


def _rgb(values: list[float]) -> tuple[float, float, float]:
    r, g, b = values
    return r, g, b


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
        problem = None if isinstance(document, dict) else f"a JSON {type(document).__name__}"
    except FileNotFoundError:
        problem = "no such file"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    if problem is not None:
        raise CheckpointError(
            str(path),
            expected="a JSON object, as in a diffusers checkpoint folder",
            got=problem,
            remedy="Pass the folder with model_index.json; download it again if parts are missing.",
        )
    result: dict[str, Any] = document
    return result
