"""The decoder's work on single frames, traced once: the graph that tracing every frame leaves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.networks.single_frames import DOMAIN, SingleFrames
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import vae_decoder
from svd_export import to_onnx
from svd_export.to_onnx import trace

FRAMES = 3


@pytest.fixture(scope="module")
def decoders(tiny_checkpoint: Path) -> dict[str, ir.Model]:
    """Each frame traced, and one for all."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    profile = Profile(FRAMES, 32, 48, decode_chunk=FRAMES)
    spec = vae_decoder(profile, checkpoint.model.architecture, FLOAT32, FRAMES)
    network = Modules(checkpoint, rewrites=rewrites_for("onnxruntime", "cpu")).network(spec)
    made = {"one": trace(network, spec)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "one_for_all", torch.no_grad)
        made["each"] = trace(network, spec)
    return made


def test_the_same_graph(decoders: dict[str, ir.Model]) -> None:
    each, one = (Counter(node.op_type for node in decoders[name].graph) for name in ("each", "one"))
    assert each == one
    assert one["Conv"] > 10 * FRAMES
    for model in decoders.values():
        assert all(node.domain == "" for node in model.graph)
        assert DOMAIN not in model.opset_imports
    names = [value.name for node in decoders["one"].graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_the_same_function(decoders: dict[str, ir.Model]) -> None:
    latent = np.random.default_rng(0).standard_normal((FRAMES, 4, 16, 24), np.float32)
    each, one = (
        onnxruntime.InferenceSession(ir.to_proto(decoders[name]).SerializeToString())
        for name in ("each", "one")
    )
    np.testing.assert_array_equal(*(session.run(None, {"latent": latent})[0] for session in (each, one)))


def test_frames_of_a_tensor_and_together_again() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    for axis in range(3):
        frames = SingleFrames.of(x, axis)
        assert len(frames.each) == frames.count == x.shape[axis]
        assert torch.equal(frames.map(lambda frame: frame + 1).together(axis), x + 1)
