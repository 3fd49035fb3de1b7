"""What the tests share: diffusers' own pipeline on tiny random networks, saved as a checkpoint folder, and
bundles exported from it.  Expensive things are made once a session and only read."""

from __future__ import annotations

import functools
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the hub

from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.networks import counting
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.profile import Profile
from svd_engine.spec.tensors import NetworkSpec
from svd_export import to_onnx
from svd_export.to_onnx import export_bundle
from tests.support import damage, tensorrt_plans, traces
from tests.support.paths import ROOT
from tests.support.shared import made_once

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out already
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)
    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    onnxruntime.SessionOptions = OneThread
# A second of every network's export, and the same each time.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C

HEIGHT, WIDTH = 32, 48  # pixels, of every tiny video
FRAMES, CHUNK = 3, 2  # the chunk does not divide the frames
ONE_OF_EACH = Profile(2, 32, 16, 1, "single", 2)  # no guidance, one chunk


LONGEST = (  # begun first, in this order: the last to end are short
    "tests/triton",
    "tests/export/test_tensorrt_rtx.py",
    "tests/examples",
    "tests/engine/test_demo.py",
    "tests/engine/test_planner.py",
    "tests/bench/test_gpu_check.py",
    "tests/engine/test_rewrites_graph.py",
    "tests/web",
    "tests/training",
    "tests/contract",
    "tests/test_install.py",
    "tests/export/test_two_processes.py",
    "tests/test_portability.py",
)


def group(nodeid: str) -> str:
    """Tests of one group run in one worker: a file's share its fixtures, Triton's ask one server."""
    return "tests/triton" if nodeid.startswith("tests/triton/") else nodeid.partition("::")[0]


def place(item: pytest.Item) -> int:
    return next((n for n, name in enumerate(LONGEST) if group(item.nodeid).startswith(name)), len(LONGEST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Garbage is looked for less often, and not among what was imported: a tenth of a test's time.

    An export makes millions of objects, and each full collection goes through those of every library too.
    """
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)  # Python 3.11 has 700


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log)


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What bundles share is traced for the first of them; who holds `trace` itself imports it by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "trace", traces.once(to_onnx.trace, tmp_path_factory))
        yield


@pytest.fixture(scope="session", autouse=True)
def counted_once() -> Iterator[None]:
    """A network is counted for the first engine that asks, and known to those of the same configs."""
    known: dict[object, NetworkCost] = {}

    class Costs(counting.TorchCosts):
        def __init__(self, *of: Any) -> None:
            super().__init__(*of)
            rewrites = tuple(rewrite.name for rewrite in self.modules.rewrites)
            configs = repr(self.modules.checkpoint.configs)
            self.of = configs, self.device, tuple(self.modules.without_rewrites), rewrites

        def __call__(self, spec: NetworkSpec) -> NetworkCost:
            if (self.of, spec) not in known:
                known[self.of, spec] = super().__call__(spec)
            return known[self.of, spec]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "TorchCosts", Costs)
        yield


@pytest.fixture
def notices(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """The engine's notices, each once, whether or not a command of this process shows them."""
    logger = logging.getLogger("svd_engine.notices")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "svd_engine.notices"):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def diffusers_pipeline() -> Any:
    """The reference: two-level networks, everything random, blends and norms included."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
        num_frames=14,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            intermediate_size=37,
            patch_size=8,
        )
    )
    with torch.no_grad():
        for network in (unet, vae):  # the defaults (blends of 0.5, norms of 1) would hide mistakes
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=clip.eval(),
        unet=unet.eval(),
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def stability_pipeline() -> Any:
    """As `diffusers_pipeline`, of widths that tell the heads as in Stability's files: 64 and 80 channels.

    Three levels, so that there are upsamplers behind a resnet and behind attention.
    """
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    from svd_engine.checkpoint.random_weights import svd_configs

    configs = svd_configs(25)
    torch.manual_seed(1)
    sizes = {
        "block_out_channels": (64, 64, 128),
        "num_attention_heads": (1, 1, 2),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
        "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
        "cross_attention_dim": 32,
    }
    unet = UNetSpatioTemporalConditionModel.from_config(configs["unet"] | sizes)
    vae = AutoencoderKLTemporalDecoder.from_config(
        configs["vae"]
        | {
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "layers_per_block": 1,
        }
    )
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=160,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=37,
            patch_size=8,
            hidden_act="gelu",
        )
    )
    with torch.no_grad():
        for network in (unet, vae, clip):
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.eval().requires_grad_(False),
        image_encoder=clip.eval().requires_grad_(False),
        unet=unet.eval().requires_grad_(False),
        scheduler=EulerDiscreteScheduler.from_config(configs["scheduler"]),
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_checkpoint(diffusers_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks in a folder that diffusers wrote."""
    return made_once(tmp_path_factory, "checkpoint/tiny", diffusers_pipeline.save_pretrained)


@pytest.fixture(scope="session")
def smallest_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_checkpoint` with a UNet of one level: for exports in processes of their own."""
    from diffusers import UNetSpatioTemporalConditionModel

    def make(folder: Path) -> None:
        shutil.copytree(tiny_checkpoint, folder)
        torch.manual_seed(0)
        unet = UNetSpatioTemporalConditionModel.from_config(
            UNetSpatioTemporalConditionModel.load_config(folder / "unet"),
            block_out_channels=(32,), num_attention_heads=(2,),
            down_block_types=("DownBlockSpatioTemporal",), up_block_types=("UpBlockSpatioTemporal",),
        )  # fmt: skip
        unet.save_pretrained(folder / "unet")

    return made_once(tmp_path_factory, "checkpoint/smallest", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, both guidance modes: `tiny_checkpoint` at 3 frames of 32x48, decode chunk 2."""
    profiles = [Profile(FRAMES, HEIGHT, WIDTH, 1, guidance, CHUNK) for guidance in ("batched", "single")]
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return made_once(
        tmp_path_factory,
        "bundle/tiny",
        lambda folder: export_bundle(checkpoint, folder, profiles, torch.float32),
    )


@pytest.fixture(scope="session")
def tiny_half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_bundle`, float16: it holds graphs for TensorRT too."""
    profiles = [Profile(FRAMES, HEIGHT, WIDTH, 1, guidance, CHUNK) for guidance in ("batched", "single")]
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return made_once(
        tmp_path_factory,
        "bundle/tiny-half",
        lambda folder: export_bundle(checkpoint, folder, profiles, torch.float16),
    )


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float16, one network of each kind."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return made_once(
        tmp_path_factory,
        "bundle/half",
        lambda folder: export_bundle(checkpoint, folder, [ONE_OF_EACH], torch.float16),
    )


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32: the checkpoint that ships, at its own size, decoded whole."""
    demo = open_checkpoint("demo")
    model = demo.model
    profile = Profile(model.frames, model.height, model.width, decode_chunk=model.frames)
    return made_once(
        tmp_path_factory, "bundle/demo", lambda folder: export_bundle(demo, folder, [profile], torch.float32)
    )


@pytest.fixture(scope="session")
def demo_half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float16: the checkpoint that ships, at 4 frames of 64x96, decoded whole."""
    profile = Profile(4, 64, 96, decode_chunk=4)
    return made_once(
        tmp_path_factory,
        "bundle/demo-half",
        lambda folder: export_bundle(open_checkpoint("demo"), folder, [profile], torch.float16),
    )


@pytest.fixture
def planned(tiny_half_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_half_bundle` with a plan of every network for the TensorRT double's GPU."""
    folder = damage.copy(tiny_half_bundle, tmp_path)
    tensorrt_plans.add_plans(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_2_25_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32: `tiny_checkpoint` at two frames and at SVD-XT's 25, decoded whole; one file of weights."""
    profiles = [Profile(frames, HEIGHT, WIDTH, decode_chunk=frames) for frames in (2, 25)]
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return made_once(
        tmp_path_factory,
        "bundle/tiny-2-25",
        lambda folder: export_bundle(checkpoint, folder, profiles, torch.float32),
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout, whose build folder two builds at once would share."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]

    def build(folder: Path) -> None:
        subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True, capture_output=True)

    (made,) = made_once(tmp_path_factory, "wheel", build).glob("*.whl")
    return made


@pytest.fixture(scope="session", params=["eager", "onnxruntime"])
def tiny_engine(request: pytest.FixtureRequest) -> Iterator[VideoEngine]:
    """The tiny networks on each reference-grade backend."""
    if request.param == "eager":
        folder = request.getfixturevalue("tiny_checkpoint")
        engine = VideoEngine.from_checkpoint(str(folder), backend="eager", device="cpu")
    else:
        folder = request.getfixturevalue("tiny_bundle")
        engine = VideoEngine.from_bundle(folder, device="cpu")
    with engine:
        yield engine
