"""SV3D_u and SV3D_p, and decoders of single images, against Stability's formulas written out and diffusers.

Tiny random networks in files with Stability's names.
"""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNetSpatioTemporalConditionModel
from diffusers.models.embeddings import Timesteps
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from svd_engine import VideoEngine, load_image
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.configs import describe, read_configs
from svd_engine.checkpoint.opening import Checkpoint, hides_frames, open_checkpoint
from svd_engine.checkpoint.sv3d_port import unet_config
from svd_engine.cli.main import main
from svd_engine.continuing import continue_video
from svd_engine.errors import CheckpointError, ImageError, SettingsError
from svd_engine.media.image import decode_image, objects_on_white
from svd_engine.networks.counting import TorchCosts
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import TENSORRT_REWRITES, rewrites_for
from svd_engine.request import Settings, own_values
from svd_engine.sampling import guiders
from svd_engine.serving.triton import inputs
from svd_engine.spec.conditioning import sv3d_p_conditioning, sv3d_u_conditioning
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Reuse
from svd_engine.spec.tables import specs_of
from svd_engine.spec.weights import COMPONENTS, Component
from svd_export.convert import write_folder
from svd_export.to_onnx import export_bundle
from svd_export.verify import exported_from
from tests.engine.rewrite_networks import random_
from tests.support import stability_file
from tests.support.commands import call

SIZE, FRAMES = 32, 3  # pixels, of calls here
UNET = {
    "block_out_channels": (64, 64),
    "num_attention_heads": (1, 1),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1,
}
CALL: dict[str, Any] = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "output_type": "pt"}


@pytest.fixture(scope="module")
def image_vae() -> Any:
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    with torch.no_grad():
        for parameter in vae.parameters():  # norms of 1 would hide a mistake
            parameter += 0.05 * torch.randn_like(parameter)
    return vae.eval()


@pytest.fixture(scope="module")
def unets(stability_pipeline: Any) -> dict[str, Any]:
    """By family, of diffusers' own class: SV3D_p's embeddings are wider, its weights have the same places."""

    def made(width: int) -> Any:
        torch.manual_seed(width)
        config = {**stability_pipeline.unet.config, "projection_class_embeddings_input_dim": width, **UNET}
        return random_(UNetSpatioTemporalConditionModel.from_config(config), torch.float32)

    return {"u": made(256), "p": made(1280)}


@pytest.fixture(scope="module")
def files(
    stability_pipeline: Any, unets: dict[str, Any], image_vae: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """SV3D_u has an image decoder, SV3D_p a temporal one.  Only to be read."""
    folder, made = tmp_path_factory.mktemp("sv3d"), {}
    decoders = {"u": image_vae.decoder, "p": stability_pipeline.vae.decoder}
    for family, unet in unets.items():
        tensors = stability_file.sv3d_tensors(
            unet, stability_pipeline.image_encoder, image_vae, decoders[family]
        )
        made[family] = folder / f"sv3d_{family}.safetensors"
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, made[family])
    return made


@pytest.fixture(scope="module")
def checkpoints(files: dict[str, Path]) -> dict[str, Checkpoint]:
    return {family: open_checkpoint(file) for family, file in files.items()}


@pytest.fixture(scope="module")
def engines(checkpoints: dict[str, Checkpoint]) -> dict[str, VideoEngine]:
    return {
        family: VideoEngine.from_checkpoint(one, backend="eager", device="cpu")
        for family, one in checkpoints.items()
    }


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# What is loaded


@pytest.mark.parametrize("family", ["u", "p"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_loads_what_was_written_bit_for_bit(
    checkpoints: dict[str, Checkpoint],
    unets: dict[str, Any],
    image_vae: Any,
    stability_pipeline: Any,
    family: str,
    component: Component,
) -> None:
    """The encoder is the conditioner's, the decoder the first stage's, which has no post_quant_conv."""
    loaded = checkpoints[family].load(component, torch.float32).state_dict()
    expected = {
        "unet": unets[family].state_dict(),
        "image_encoder": stability_pipeline.image_encoder.state_dict(),
        "vae": image_vae.state_dict(),
    }[component]
    if component == "vae" and family == "p":
        own = image_vae.state_dict() | {
            f"decoder.{name}": t for name, t in stability_pipeline.vae.decoder.state_dict().items()
        }
        expected = {name: own[name] for name in stability_pipeline.vae.state_dict()}
    if component == "vae" and family == "u":
        expected = expected | {
            "post_quant_conv.weight": torch.eye(4).view(4, 4, 1, 1),
            "post_quant_conv.bias": torch.zeros(4),
        }
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def without_first_stage(file: Path, folder: Path) -> Path:
    tensors = {k: t for k, t in load_file(file).items() if not k.startswith("first_stage_model.")}
    save_file(tensors, folder / "mine.safetensors")
    return folder / "mine.safetensors"


def test_without_a_first_stage_the_conditioners_decoder_is_read(
    files: dict[str, Path], image_vae: Any, tmp_path: Path
) -> None:
    file = without_first_stage(files["p"], tmp_path)
    opened = open_checkpoint(file)
    state = opened.load("vae", torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in image_vae.state_dict().items())
    gone = {
        k: t
        for k, t in load_file(file).items()
        if not k.startswith("conditioner.embedders.1.encoder.decoder.")
    }
    save_file(gone, tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="no vae; keys begin with"):
        open_checkpoint(tmp_path / "gone.safetensors")


def test_the_family_is_in_the_weights(
    files: dict[str, Path], checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Frames, size, guidance and steps of Stability's configs, whatever the file is called."""
    (tmp_path / "mine.safetensors").symlink_to(files["u"])
    assert not hides_frames(tmp_path / "mine.safetensors")
    opened = [checkpoints["u"], checkpoints["p"], open_checkpoint(tmp_path / "mine.safetensors")]
    assert [one.model.family for one in opened] == ["SV3D_u", "SV3D_p", "SV3D_u"]
    for one in opened:
        model = one.model
        assert (model.frames, model.height, model.width, model.sigma_max) == (21, 72 * 4, 72 * 4, 700.0)
        assert (model.steps, model.guider, model.noise_aug_strength) == (50, "triangle", 1e-5)
        assert (model.min_guidance_scale, model.max_guidance_scale) == (1.0, 2.5)
    assert checkpoints["u"].model.architecture.conditioning == sv3d_u_conditioning()
    assert checkpoints["p"].model.architecture.conditioning == sv3d_p_conditioning()


def test_guidance_is_a_triangle_with_its_top_in_the_middle(checkpoints: dict[str, Checkpoint]) -> None:
    model = checkpoints["u"].model
    scales = guiders.triangle(model.min_guidance_scale, model.max_guidance_scale, 1, 21)[0]
    v = torch.linspace(0, 1, 21)
    expected = 2 * (v - (v + 0.5).floor()).abs() * 1.5 + 1  # sgm's triangle wave of period 1
    assert torch.allclose(scales, expected)
    assert (scales[0], scales[10], scales[20]) == (1.0, 2.5, 1.0)


def test_a_folder_of_it_is_the_same_checkpoint(
    files: dict[str, Path], checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    for family in files:
        write_folder(checkpoints[family], tmp_path / family)
        again, once = open_checkpoint(tmp_path / family), checkpoints[family]
        assert {**vars(again.model), "name": ""} == {**vars(once.model), "name": ""}
        for component in COMPONENTS:
            a, b = (one.load(component, torch.float32).state_dict() for one in (again, once))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


PORTED_INDEX = {"_class_name": "StableVideo3DDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}


@pytest.fixture(scope="module")
def ported(
    stability_pipeline: Any, unets: dict[str, Any], image_vae: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """SV3D_p as chenguolin/sv3d-diffusers writes it: 25 frames by default, and the side of a square."""
    folder = tmp_path_factory.mktemp("ported")
    parts = {**stability_pipeline.components, "unet": unets["p"], "vae": image_vae}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    config = json.loads((folder / "unet/config.json").read_text())
    config |= {"_class_name": "SV3DUNetSpatioTemporalConditionModel", "num_frames": 25, "sample_size": 72}
    (folder / "unet/config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(PORTED_INDEX))
    return folder


def test_the_diffusers_port_makes_the_video_of_the_single_file(
    files: dict[str, Path], ported: Path, tmp_path: Path
) -> None:
    """Its angles are embedded as Stability does, so it is the same network under diffusers' names."""
    angles = torch.rand(5, generator=generator()) * 6
    embedded = Timesteps(512, flip_sin_to_cos=True, downscale_freq_shift=0)(angles)
    assert torch.allclose(embedded, sgm_embedding(angles.tolist(), 512), atol=1e-6)
    single = open_checkpoint(without_first_stage(files["p"], tmp_path))
    assert {**vars(open_checkpoint(ported).model), "name": ""} == {**vars(single.model), "name": ""}
    photograph = torch.rand(1, 3, SIZE, SIZE, generator=generator())
    made = []
    for checkpoint in (ported, single):
        with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu") as engine:
            made.append(engine(photograph, generator=generator(), num_inference_steps=1, **CALL).frames)
    assert torch.equal(*made)


def test_the_ports_unet_is_a_part_and_its_folder_converts(
    files: dict[str, Path], ported: Path, tmp_path: Path
) -> None:
    for unet in (ported, ported / "unet"):
        model = open_checkpoint(files["u"], parts={"unet": unet}).model
        assert (model.family, model.frames) == ("SV3D_p", 21)
    write_folder(open_checkpoint(ported), tmp_path / "converted")
    again, once = open_checkpoint(tmp_path / "converted"), open_checkpoint(ported)
    assert {**vars(again.model), "name": ""} == {**vars(once.model), "name": ""}


@pytest.mark.parametrize(("frames", "side", "is_"), [(16, 48, (16, 192)), (None, None, (21, 288))])
def test_frames_and_side_of_the_port_count_where_it_says_them(
    ported: Path, frames: int | None, side: int | None, is_: tuple[int, int]
) -> None:
    configs = dict(read_configs(ported))
    given = {"num_frames": frames, "sample_size": side}
    config = {**configs["unet"], "_class_name": "SV3DUNetSpatioTemporalConditionModel", **given}
    configs["unet"] = unet_config({key: value for key, value in config.items() if value is not None})
    model = describe("mine", "here", configs)
    assert (model.frames, model.height, model.width) == (is_[0], is_[1], is_[1])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_frames", "21", "key num_frames: expected a valid integer"),
        ("sample_size", "72", "key sample_size: expected"),
        ("projection_class_embeddings_input_dim", 1024, "expected 768, 256 or 1280"),
        ("_class_name", "SV3DUNet", "key _class_name: expected 'UNetSpatioTemporalConditionModel'"),
    ],
)
def test_what_is_not_the_ports_layout(ported: Path, tmp_path: Path, key: str, value: Any, says: str) -> None:
    folder = shutil.copytree(ported, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "unet/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(folder)
    assert says in str(refused.value)


# What the denoiser is told


def sgm_embedding(numbers: Any, width: int) -> Tensor:
    """`timestep_embedding` of sgm's modules: cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    arguments = torch.tensor(numbers, dtype=torch.float64).float()[:, None] * frequencies
    return torch.cat([arguments.cos(), arguments.sin()], dim=1)


def sgm_angles(frames: int, elevations: Any, azimuths: Any = None) -> tuple[list[float], list[float]]:
    """Polar and azimuth of each frame, in radians, of sgm's `simple_video_sample.py`."""
    polars = [np.deg2rad(90 - e) for e in elevations]
    if azimuths is None:
        azimuths = np.linspace(0, 360, frames + 1)[1:] % 360
    return polars, [np.deg2rad((a - azimuths[-1]) % 360) for a in azimuths]


@pytest.mark.parametrize(
    ("elevation", "azimuths"),
    [(None, None), (-30.5, None), ([0.0, 10.0, 20.0, 5.0], [350.0, 30.0, -80.0, 40.0])],
)
def test_angles_are_stability_s(elevation: Any, azimuths: Any) -> None:
    frames = 4 if azimuths else 21
    settings = Settings(frames=frames, height=64, width=64, elevation=elevation, azimuths=azimuths)
    rows = sv3d_p_conditioning().rows(settings.told | {"noise_aug_strength": 1e-5}, frames)
    listed = elevation if isinstance(elevation, list) else [10.0 if elevation is None else elevation] * frames
    polars, around = sgm_angles(frames, listed, azimuths)
    assert np.allclose(rows, np.stack([[1e-5] * frames, polars, around], axis=1), atol=1e-12)
    assert rows[-1][2] % (2 * math.pi) == 0  # the last frame is the photograph's view


def specs(checkpoint: Checkpoint, guidance: Any, videos: int) -> Any:
    profile = Profile(FRAMES, SIZE, SIZE, videos, guidance, FRAMES)
    return specs_of(profile, checkpoint.model.architecture, FLOAT32)


def inputs_of(checkpoint: Checkpoint, spec: Any) -> dict[str, Tensor]:
    """Of two videos, whose angles differ from each other's and from frame to frame."""
    made = {t.name: seeded(*t.shape, seed=n) for n, t in enumerate(spec.inputs)}
    conditioning = checkpoint.model.architecture.conditioning
    rows = [
        conditioning.rows(
            {"noise_aug_strength": 1e-5 * n, "elevation": [n, 20, -40], "azimuths": [10 * n, 200, 0]}, FRAMES
        )
        for n in (1, 2)
    ]
    told = torch.tensor(rows) if conditioning.per_frame else torch.tensor([row[0] for row in rows])
    return made | {"sigma": torch.tensor(3.0), "time_ids": told}


@torch.no_grad()
def reference(unet: Any, family: str, x: Any, sigma: Any, first_latent: Any, embedding: Any, ids: Any) -> Any:
    """D(x; sigma) of one half of guidance: diffusers' UNet, for SV3D_p its modules fed as sgm's VideoUNet."""
    sample = torch.cat(
        [x / (sigma**2 + 1).sqrt(), first_latent[:, None].expand(-1, x.shape[1], -1, -1, -1)], dim=2
    )
    c_noise = 0.25 * sigma.log()
    if family == "u":
        v = unet(sample, c_noise, embedding, ids).sample
    else:
        v = sgm_forward(unet, sample, c_noise, embedding, ids)
    return v * (-sigma / (sigma**2 + 1).sqrt()) + x / (sigma**2 + 1)


def sgm_forward(unet: Any, sample: Tensor, c_noise: Tensor, embedding: Tensor, ids: Tensor) -> Tensor:
    """The embedding of every frame is the timestep's plus that of the frame's own vector, `label_emb(y)`."""
    batch, frames = sample.shape[:2]
    rows = ids.flatten(0, 1)  # [B*F, 3]
    vector = torch.cat([sgm_embedding(rows[:, n].tolist(), w) for n, w in enumerate((256, 512, 512))], dim=1)
    emb = unet.time_embedding(unet.time_proj(c_noise[None].expand(batch * frames)))
    emb = emb + unet.add_embedding(vector)
    common = {"temb": emb, "image_only_indicator": torch.zeros(batch, frames)}
    context = {"encoder_hidden_states": embedding.repeat_interleave(frames, 0)}

    def attending(block: Any) -> dict[str, Any]:
        return common | (context if getattr(block, "has_cross_attention", False) else {})

    h = unet.conv_in(sample.flatten(0, 1))
    skips = (h,)
    for block in unet.down_blocks:
        h, states = block(hidden_states=h, **attending(block))
        skips += states
    h = unet.mid_block(hidden_states=h, **common, **context)
    for block in unet.up_blocks:
        skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
        h = block(hidden_states=h, res_hidden_states_tuple=own, **attending(block))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))).unflatten(0, (batch, frames))  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["u", "p"])
@pytest.mark.parametrize(
    ("rewrites", "guidance", "videos"),
    [("none", "single", 2), ("none", "batched", 2), ("torch", "batched", 1), ("tensorrt", "batched", 2)],
)
def test_the_denoiser_is_stability_s(
    checkpoints: dict[str, Checkpoint],
    unets: dict[str, Any],
    family: str,
    rewrites: str,
    guidance: str,
    videos: int,
) -> None:
    """With every rewrite; of one video the ids are one row for both halves of guidance."""
    sets = {"none": (), "torch": rewrites_for("eager", "cpu"), "tensorrt": TENSORRT_REWRITES}
    checkpoint = checkpoints[family]
    modules = Modules(checkpoint, rewrites=sets[rewrites])
    spec = specs(checkpoint, guidance, videos)[2]
    inputs = inputs_of(checkpoint, spec)
    inputs["time_ids"] = inputs["time_ids"][:videos]
    x, sigma, latent, embedding, ids = (
        inputs[name] for name in ("x", "sigma", "first_latent", "embedding", "time_ids")
    )
    with torch.no_grad():
        ours = modules.network(spec)(**inputs)
    theirs = reference(unets[family], family, x, sigma, latent, embedding, ids)
    if guidance == "batched":
        nothing = torch.zeros_like(latent), torch.zeros_like(embedding)
        without = reference(unets[family], family, x, sigma, *nothing, ids)
        theirs = without + inputs["guidance"][:, :, None, None, None] * (theirs - without)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


# A decoder of single images


@pytest.mark.parametrize("rewrites", ["none", "torch", "tensorrt", "onnxruntime"])
def test_frames_are_decoded_as_images(
    stability_pipeline: Any, image_vae: Any, tmp_path: Path, rewrites: str
) -> None:
    """svd_image_decoder.safetensors: whole or a slice at a time as diffusers' AutoencoderKL; the encoder."""
    tensors = stability_file.image_decoder_tensors(stability_pipeline, image_vae)
    file = tmp_path / "svd_image_decoder.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    checkpoint = open_checkpoint(file)
    assert (checkpoint.model.family, checkpoint.model.frames) == ("SVD", 14)
    sets = {
        "none": (), "torch": rewrites_for("eager", "cpu"), "tensorrt": TENSORRT_REWRITES,
        "onnxruntime": rewrites_for("onnxruntime", "cpu"),
    }  # fmt: skip
    modules = Modules(checkpoint, rewrites=sets[rewrites])
    profile = Profile(FRAMES, SIZE, SIZE, decode_chunk=FRAMES)
    latent = seeded(FRAMES, 4, SIZE // 4, SIZE // 4)
    with torch.no_grad():
        theirs = image_vae.decode(latent).sample
        whole, sliced = (
            specs_of(profile, checkpoint.model.architecture, FLOAT32, slice_frames)[-1]
            for slice_frames in (None, 1)
        )
        for spec in (whole, sliced):
            ours = modules.network(spec)(latent)
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        pixels = seeded(1, 3, SIZE, SIZE)
        mode = stability_pipeline.vae.encode(pixels).latent_dist.mode()  # the conditioner's, the first choice
        costs = TorchCosts(checkpoint, "cpu", (), ())  # a memory budget asks for them
        assert costs(sliced).activation_bytes < costs(whole).activation_bytes
        encoder = specs_of(profile, checkpoint.model.architecture, FLOAT32)[1]
        assert (modules.network(encoder)(pixels) - mode).abs().max() <= 1e-5


def test_diffusers_makes_the_same_video_with_an_image_decoder(
    stability_pipeline: Any, image_vae: Any, tmp_path: Path
) -> None:
    tensors = stability_file.image_decoder_tensors(stability_pipeline, image_vae)
    file = tmp_path / "svd_xt_image_decoder.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    vae = deepcopy(image_vae)
    vae.encoder, vae.quant_conv = stability_pipeline.vae.encoder, stability_pipeline.vae.quant_conv
    theirs_engine = type(stability_pipeline)(**{**stability_pipeline.components, "vae": vae})
    theirs_engine.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, SIZE, SIZE, generator=generator())
    common = {**CALL, "num_inference_steps": 4}
    theirs = theirs_engine(image, generator=generator(), **common).frames
    with VideoEngine.from_checkpoint(file, backend="eager", device="cpu") as engine:
        ours = engine(image, generator=generator(), **common).frames
        sliced = engine(image, generator=generator(), decoding="streamed", **common).frames
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - sliced).abs().max() <= 1e-5


# A whole video


def test_a_call_takes_the_model_s_own(engines: dict[str, VideoEngine]) -> None:
    model = engines["u"].model
    own = own_values({"model": model}, {})
    assert own == {
        "steps": 50, "noise_aug_strength": 1e-5, "min_guidance_scale": 1.0, "max_guidance_scale": 2.5,
        "guider": "triangle", "rho": 7.0,
    }  # fmt: skip
    assert engines["u"].preset("sgm") == {}
    result = engines["u"](torch.rand(1, 3, SIZE, SIZE), **CALL, num_inference_steps=1)
    settings = result.report.settings
    assert (settings.guider, settings.max_guidance_scale, settings.noise_aug_strength) == (
        "triangle", 2.5, 1e-5
    )  # fmt: skip


def test_the_last_frame_is_the_photograph(engines: dict[str, VideoEngine]) -> None:
    """Two photographs, two videos of each, decoded in chunks."""
    photographs = torch.rand(2, 3, SIZE, SIZE, generator=generator())
    common = {**CALL, "num_inference_steps": 1, "num_videos_per_prompt": 2, "elevation": 20.0}
    whole = engines["p"](photographs, generator=generator(), **common).frames
    chunks = engines["u"](photographs, **{**common, "elevation": None}, decode_chunk_size=2).frames
    for frames in (whole, chunks):
        assert frames.shape == (4, FRAMES, 3, SIZE, SIZE)
        assert torch.allclose(frames[:, -1], photographs.repeat_interleave(2, 0), atol=1e-6)
        assert not torch.allclose(frames[:, 0], photographs.repeat_interleave(2, 0), atol=1e-2)
    again = engines["p"](photographs[1:], generator=generator(), **{**common, "num_videos_per_prompt": 1})
    assert again.frames.shape[0] == 1


def test_angles_and_guidance_change_the_video(engines: dict[str, VideoEngine]) -> None:
    photograph, engine = torch.rand(1, 3, SIZE, SIZE, generator=generator()), engines["p"]

    def video(**asked: Any) -> Tensor:
        frames: Tensor = engine(
            photograph,
            generator=generator(),
            num_inference_steps=1,
            **{**CALL, "output_type": "latent"},
            **asked,
        ).frames
        return frames

    plain = video()
    assert torch.equal(plain, video(elevation=10, azimuths=[120, 240, 360]))
    assert torch.equal(plain, video(elevation=[10.0] * 3, azimuths=np.array([0.0, 120.0, 240.0])))
    assert not torch.allclose(plain, video(elevation=50), atol=1e-4)
    assert not torch.allclose(plain, video(azimuths=[30, 60, 90]), atol=1e-4)
    unguided = video(max_guidance_scale=1.0)
    assert not torch.allclose(plain, unguided, atol=1e-4)
    assert torch.allclose(unguided, video(guidance_scales=[1.0] * 3), atol=1e-5)


def test_reuse_knows_every_frame_s_angles(
    checkpoints: dict[str, Checkpoint], engines: dict[str, VideoEngine]
) -> None:
    image = torch.rand(1, 3, SIZE, SIZE, generator=generator())
    asked: dict[str, Any] = {
        **CALL,
        "output_type": "latent",
        "num_inference_steps": 1,
        "azimuths": [90, 9, 0],
    }
    with VideoEngine.from_checkpoint(
        checkpoints["p"], backend="eager", device="cpu", reuse=Reuse(interval=2)
    ) as engine:
        ours = engine(image, generator=generator(), **asked).frames
    plain = engines["p"](image, generator=generator(), **asked).frames
    assert (ours - plain).abs().max() <= 1e-4


def test_triton_takes_one_elevation_or_one_for_each_frame() -> None:
    def read(**given: list[float]) -> dict[str, Any]:
        sent = {name: np.array(value, np.float32) for name, value in given.items()}
        image = np.array([b"png"], dtype=np.object_)
        return inputs.read({"image": image, **sent}, 100, 1, 50).sampling

    assert read(elevation=[12.5]) == {"elevation": 12.5}
    assert read(elevation=[1.0, 2.0], azimuths=[3.0, 4.0]) == {"elevation": [1, 2], "azimuths": [3, 4]}


@pytest.mark.parametrize(
    ("family", "asked", "says"),
    [
        ("p", {"azimuths": [0.0, 1.0]}, "azimuths: expected 3 numbers, one for each frame, got 2"),
        ("p", {"azimuths": 30.0}, "azimuths: expected 3 numbers, one for each frame, got one number"),
        ("p", {"elevation": [1.0, 2.0]}, "elevation: expected 3 numbers, one for each frame, got 2"),
        ("p", {"elevation": float("nan")}, "elevation: expected a finite number, got nan"),
        ("p", {"elevation": 90.5}, "elevation: expected -90 to 90, got 90.5"),
        ("p", {"elevation": "up"}, "elevation: expected a finite number, got 'up'"),
        ("p", {"azimuths": []}, "azimuths: expected a number of degrees, or a list of one for each frame"),
        ("p", {"azimuths": [0.0, float("inf"), 1.0]}, "azimuths: expected a finite number, got inf"),
        ("p", {"motion_bucket_id": 100}, "told noise_aug_strength, elevation, azimuths, got 100.0"),
        ("u", {"elevation": 10.0}, "the networks of sv3d_u are told noise_aug_strength, got 10.0"),
        ("u", {"azimuths": [1.0, 2.0, 3.0]}, "azimuths: expected it to be left out"),
    ],
)
def test_what_no_camera_can_do(
    engines: dict[str, VideoEngine], family: str, asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        engines[family](torch.rand(1, 3, SIZE, SIZE), **CALL, **asked)
    assert says in str(refused.value)


def test_svd_takes_no_camera(tiny_checkpoint: Path) -> None:
    with (
        VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", device="cpu") as engine,
        pytest.raises(SettingsError, match="elevation: expected it to be left out: the networks of"),
    ):
        engine(torch.rand(1, 3, 64, 64), elevation=10.0)


def test_an_orbit_continues_no_clip(engines: dict[str, VideoEngine]) -> None:
    with pytest.raises(SettingsError, match="engine: expected a model whose videos begin at the image"):
        continue_video(engines["u"], np.zeros((2, SIZE, SIZE, 3), np.uint8))


def test_lora_is_fused(files: dict[str, Path], unets: dict[str, Any], tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows, columns = unets["p"].get_submodule(name).weight.shape
    down, up = seeded(2, columns), seeded(rows, 2, seed=1)
    save_file(
        {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}, tmp_path / "l.safetensors"
    )
    opened = open_checkpoint(files["p"], lora={tmp_path / "l.safetensors": 0.5})
    weight = opened.load("unet", torch.float32).get_submodule(name).weight
    assert torch.allclose(weight, unets["p"].get_submodule(name).weight + 0.5 * up @ down, atol=1e-6)


def test_a_bundle_makes_the_same_video(files: dict[str, Path], tmp_path: Path) -> None:
    """Of SV3D_p with an image decoder, so that both are in graphs."""
    checkpoint = open_checkpoint(without_first_stage(files["p"], tmp_path))
    profile = Profile(FRAMES, SIZE, SIZE, decode_chunk=FRAMES)
    export_bundle(checkpoint, tmp_path / "bundle", [profile], torch.float32)
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.manifest.model == checkpoint.model
    assert exported_from(bundle).digest() == bundle.manifest.source.digest
    photograph = torch.rand(1, 3, SIZE, SIZE, generator=generator())
    asked = {"num_inference_steps": 1, "azimuths": [10.0, 90.0, 0.0], "elevation": [0.0, 60.0, 10.0]}
    with VideoEngine.from_bundle(tmp_path / "bundle", device="cpu") as engine:
        ours = engine(photograph, generator=generator(), output_type="pt", **asked).frames
    with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu") as engine:
        eager = engine(photograph, generator=generator(), **CALL, **asked).frames
    assert (ours - eager).abs().max() <= 1e-4


# The picture


def picture(mode: str = "RGBA") -> Image.Image:
    """An object of 20 x 12 pixels with a soft edge, off the centre of a transparent picture."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 70, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[5:17, 40:60, 3] = rng.integers(1, 256, (12, 20), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def stability_s(image: Image.Image, side: int, ratio: float) -> np.ndarray:
    """sgm's preparation, without OpenCV: bounding box, square, resize, white."""
    values = np.array(image)
    rows, columns = (np.flatnonzero((values[..., 3] > 0).any(axis)) for axis in (1, 0))
    (y, h), (x, w) = ((found[0], found[-1] - found[0] + 1) for found in (rows, columns))
    length = int(max(w, h) / ratio)
    padded = np.zeros((length, length, 4), np.uint8)
    middle = length // 2
    top, left = middle - h // 2, middle - w // 2
    padded[top : top + h, left : left + w] = values[y : y + h, x : x + w]
    resized = np.array(Image.fromarray(padded).resize((side, side), Image.Resampling.LANCZOS)) / 255.0
    rgb = resized[..., :3] * resized[..., -1:] + (1 - resized[..., -1:])
    return (rgb * 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (1, 1), (3, 3), (17, 2)])
def test_an_object_is_framed_as_stability_does(size: tuple[int, int]) -> None:
    image = picture().crop((40, 5, 60, 17)).resize(size)
    image.putalpha(255)
    canvas = Image.new("RGBA", (40, 40))
    canvas.paste(image, (3, 2))
    for one in (picture(), canvas):
        (ours,) = objects_on_white([one], 48)
        assert ours.mode == "RGB"
        assert np.array_equal(np.asarray(ours), stability_s(one, 48, 0.917))


def test_pictures_without_an_object_or_without_transparency() -> None:
    plain = picture("RGB")
    assert objects_on_white([plain], 48) == [plain]
    with pytest.raises(ImageError, match="got a picture that is transparent throughout"):
        objects_on_white(Image.new("RGBA", (8, 8)), 48)
    long = Image.new("RGBA", (60_000, 8), "red")
    with pytest.raises(ImageError, match="square around the object: expected at most"):
        objects_on_white(long, 48)


def test_an_engine_frames_what_is_not_transparent(
    engines: dict[str, VideoEngine], tiny_checkpoint: Path
) -> None:
    engine, asked = engines["u"], {**CALL, "num_inference_steps": 1}
    frames = engine([picture(), picture("RGB")], **asked).frames
    framed = stability_s(picture(), SIZE, 0.917).transpose(2, 0, 1) / 255
    stretched = np.asarray(picture("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.allclose(frames[0, -1], framed, atol=1e-6)
    assert np.allclose(frames[1, -1], stretched / 255, atol=1e-6)
    with pytest.raises(SettingsError, match="image: expected a PIL image"):
        engine("photo.jpg", **asked)


def test_a_file_keeps_its_transparency_where_it_is_asked_to(tmp_path: Path) -> None:
    """Laid over white it is what it was before, so nothing changes for SVD."""
    for mode in ("RGBA", "LA", "RGB"):
        picture(mode).save(tmp_path / "picture.png")
        kept = load_image(tmp_path / "picture.png", transparency=True)
        assert kept.mode == ("RGB" if mode == "RGB" else "RGBA")
        content = (tmp_path / "picture.png").read_bytes()
        assert decode_image(content, transparency=True).tobytes() == kept.tobytes()
        white = Image.alpha_composite(Image.new("RGBA", kept.size, "white"), kept.convert("RGBA"))
        assert load_image(tmp_path / "picture.png").tobytes() == white.convert("RGB").tobytes()


# The commands


def test_the_command_makes_an_orbit(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture().save(tmp_path / "object.png")
    size = ("--height", SIZE, "--width", SIZE, "--frames", FRAMES, "--steps", 1, "--backend", "eager")

    def run(*options: object) -> int:
        source = ("generate", tmp_path / "object.png", "--checkpoint", files["p"], "--device", "cpu")
        return call(main, *source, *size, *options)

    assert run("-o", tmp_path / "frames", "--elevation", 12.5, "--azimuths", "90,180,0") == 0
    assert "is squeezed" not in capsys.readouterr().err
    last = np.asarray(Image.open(sorted((tmp_path / "frames").iterdir())[-1]).convert("RGB"))
    assert np.abs(last.astype(int) - stability_s(picture(), SIZE, 0.917)).max() <= 1
    assert run("-o", tmp_path / "two", "--azimuths", "90,180") == 2
    assert "azimuths: expected 3 numbers, one for each frame, got 2" in capsys.readouterr().err
    assert call(main, "info", files["p"]) == 0
    said = capsys.readouterr().out
    assert "family          SV3D_p, told noise_aug_strength, elevation, azimuths\n" in said
    assert call(main, "info", files["u"]) == 0
    assert "SV3D_u, told noise_aug_strength; each frame is decoded as an image\n" in capsys.readouterr().out
