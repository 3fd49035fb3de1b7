"""SVD's and SVD-XT's real networks, with random weights, loaded and run on an ordinary machine.

`make full` runs what CI has minutes for, `make longest` all.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svd_bench.memory.plans import COMMITTED, plans_document, read_plans, ways_of_torch
from svd_engine.checkpoint.opening import random_checkpoint
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import denoiser
from svd_engine.spec.weights import COMPONENTS

pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]

GIB = 2**30

LOAD = """
import sys
import torch
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.checkpoint.weights import build

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

checkpoint, component = open_checkpoint(sys.argv[1]), sys.argv[2]
build(component, checkpoint.configs[component])  # loads the libraries
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
module = checkpoint.load(component, torch.float16)
print(sum(t.numel() * t.element_size() for t in module.state_dict().values()), status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_single_file_is_loaded_in_little_more_than_its_size(single_file: Path) -> None:
    total = 0
    for component in COMPONENTS:
        command = [sys.executable, "-c", LOAD, str(single_file), component]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size, peak = map(int, done.stdout.split())
        print(f"\n{component}: {size / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB more than before")
        assert peak <= size + GIB
        total += size
    assert total == pytest.approx(single_file.stat().st_size, rel=0.01)


WITHIN = """
import re, torch
from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import random_checkpoint

with VideoEngine.from_checkpoint(random_checkpoint("svd"), device="cpu", memory="8GiB") as engine:
    run = engine(torch.rand(1, 3, 64, 128), 64, 128, 14, num_inference_steps=1, output_type="pt").report
status = open("/proc/self/status").read()
print("seen", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), run.plan.peak_bytes, run.plan.residency)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_video_within_a_budget() -> None:
    """SVD's networks in float32, 8.5 GiB with their libraries, in 8 GiB of a process: one at a time.

    The peak is of loading the UNet.
    """
    done = subprocess.run([sys.executable, "-c", WITHIN], capture_output=True, text=True, check=True)
    seen, planned, residency = done.stdout.split("seen ")[1].split()
    print(f"\na video within 8 GiB: planned {int(planned) / GIB:.2f} GiB, seen {int(seen) / GIB:.2f} GiB")
    assert residency == "swapped"
    assert int(seen) <= int(planned) <= 8 * GIB


@pytest.mark.longest
def test_the_committed_plans_are_what_is_counted() -> None:
    """docs/cards.md shows them: every row of torch, whose networks take minutes to count."""
    shown = [row for row in read_plans(COMMITTED).rows if row.source == "counted"]
    ways = [ways_of_torch(random_checkpoint(family)) for family in ("svd", "svd-xt")]
    assert tuple(shown) == plans_document(ways).rows


def test_diffusers_attends_twice_as_often() -> None:
    """64 times a step: half of it to one token, which the rewrites turn into that token's projection."""
    from diffusers import UNetSpatioTemporalConditionModel
    from diffusers.models.attention_processor import Attention

    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(random_checkpoint("svd").configs["unet"])
    assert sum(isinstance(part, Attention) for part in unet.modules()) == 64


@pytest.mark.longest  # tiny ones of the same modules are held in CI, rewrite by rewrite
def test_the_full_unet_equals_diffusers_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    """14 frames of 64x128 through our denoiser, rewrites on, and diffusers' own UNet: 1e-4 relative."""
    checkpoint = random_checkpoint("svd")
    spec = denoiser(Profile(14, 64, 128), checkpoint.model.architecture, FLOAT32)
    inputs = example_inputs(spec)
    with torch.no_grad():
        ours = Modules(checkpoint).network(spec)(**inputs)
        unet = checkpoint.load("unet", torch.float32)
        expected = reference(unet, inputs)
    relative = float((ours - expected).abs().max() / expected.abs().max())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with capsys.disabled():
        print(f"\nfull UNet, float32: relative difference {relative:.2e}, peak {peak / GIB:.2f} GiB")
    assert relative <= 1e-4


def reference(unet: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One guided step written out as diffusers' pipeline and EulerDiscreteScheduler have it."""
    x, sigma, guidance = inputs["x"], inputs["sigma"], inputs["guidance"][:, :, None, None, None]
    scaled = torch.cat([x] * 2) / (sigma**2 + 1) ** 0.5
    first = torch.cat([torch.zeros_like(inputs["first_latent"]), inputs["first_latent"]])
    first = first.unsqueeze(1).repeat(1, x.shape[1], 1, 1, 1)
    embedding = torch.cat([torch.zeros_like(inputs["embedding"]), inputs["embedding"]])
    v = unet(
        torch.cat([scaled, first], dim=2),
        0.25 * sigma.log(),
        encoder_hidden_states=embedding,
        added_time_ids=torch.cat([inputs["time_ids"]] * 2),
        return_dict=False,
    )[0]
    unconditional, conditional = v.chunk(2)
    v = unconditional + guidance * (conditional - unconditional)
    return v * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
