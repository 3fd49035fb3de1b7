"""`svd-export tensorrt` over the recording double: what it asks of TensorRT, what it leaves in the bundle."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from svd_engine.bundle.manifest import MANIFEST
from svd_engine.bundle.plans import fitting_plan
from svd_engine.bundle.reading import Bundle
from svd_engine.install import install_line
from svd_export.cli import main
from svd_export.tensorrt_builder import BuildOptions
from svd_export.tensorrt_cli import memory_bytes
from svd_export.to_tensorrt import build_plans
from tests.export.conftest import NETWORKS, built, plans
from tests.support import damage, tensorrt_builder_double
from tests.support.commands import call
from tests.support.tensorrt_builder_double import BuilderFlag, HardwareCompatibilityLevel
from tests.support.tensorrt_double import GPU, VERSION
from tests.support.tensorrt_plans import HOST


def test_every_network_receives_a_plan_that_fits_here(trt: Any, folder: Path) -> None:
    rows = build_plans(Bundle(folder))
    bundle = Bundle(folder)
    assert list(bundle.manifest.plans) == rows
    assert tuple(plans(folder)) == NETWORKS
    for entry in bundle.manifest.networks:
        row = fitting_plan(bundle, entry.spec, HOST)
        content = bundle.read_plan(row)
        assert json.loads(content)["key"] == entry.spec.key
        assert bundle.manifest.files[row.file].sha256 == hashlib.sha256(content).hexdigest()
        assert (row.flavour, row.version) == ("tensorrt", VERSION)
        assert (row.target.gpu, row.target.capabilities) == (GPU, ((9, 0),))
        assert row.precision == entry.spec.precision
        assert row.device_memory_bytes == tensorrt_builder_double.DEVICE_MEMORY
        assert (row.stripped, row.refittable, row.optimization_level) == (False, False, 3)
        assert row.workspace_bytes == 8 * 2**30
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_plan_that_is_gone_or_cut_is_built_again(trt: Any, folder: Path, spoil: Any) -> None:
    (row,) = build_plans(Bundle(folder), networks=["denoiser"])
    spoil(folder / row.file)
    assert build_plans(Bundle(folder), networks=["denoiser"]) == [row]
    assert json.loads(Bundle(folder).read_plan(row))["key"] == row.network


def test_what_tensorrt_is_asked_for(trt: Any, folder: Path) -> None:
    build_plans(Bundle(folder), networks=["denoiser"])
    graph = damage.network(folder, "denoiser")["graphs"]["tensorrt"]
    order = [name for name in trt.order() if not name.endswith("freed")]
    assert order == [
        "Builder.__init__", "Builder.create_network", "OnnxParser.parse_from_file",
        "IBuilderConfig.set_memory_pool_limit", "IBuilderConfig.create_timing_cache",  # by Polygraphy
        "IBuilderConfig.create_timing_cache", "cuda.set_device",
        "Builder.build_serialized_network", "Runtime.__init__", "Runtime.deserialize_cuda_engine",
    ]  # fmt: skip
    assert trt.called("Builder.create_network") == [(1 << 1,)]  # strongly typed
    assert trt.called("OnnxParser.parse_from_file") == [(graph,)]  # from a file, for the weights
    assert trt.called("IBuilderConfig.set_memory_pool_limit") == [("WORKSPACE", 8 * 2**30)]
    (config,) = trt.configs
    assert config.flags == set()  # no TF32: float32 means float32
    assert config.max_aux_streams == 0
    assert config.hardware_compatibility_level is HardwareCompatibilityLevel.NONE
    assert config.builder_optimization_level == 3


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (BuildOptions(stripped=True), {BuilderFlag.STRIP_PLAN, BuilderFlag.REFIT_IDENTICAL}),
        (BuildOptions(refittable=True), {BuilderFlag.REFIT}),
        (BuildOptions(stripped=True, refittable=True), {BuilderFlag.STRIP_PLAN, BuilderFlag.REFIT}),
    ],
)
def test_weights_that_are_given_later(trt: Any, folder: Path, options: BuildOptions, flags: Any) -> None:
    (row,) = build_plans(Bundle(folder), options, ["vae_decoder"])
    assert trt.configs[0].flags == flags
    assert (row.stripped, row.refittable, row.other_weights) == (options.stripped, True, options.refittable)
    assert json.loads((folder / row.file).read_bytes())["stripped"] is options.stripped


def test_weights_that_stream(trt: Any, folder: Path) -> None:
    """What stays at the least, as the loaded engine says; built anew with or without it."""
    (row,) = build_plans(Bundle(folder), BuildOptions(stream_weights=True), ["vae_decoder"])
    assert trt.configs[0].flags == {BuilderFlag.WEIGHT_STREAMING}
    others = (folder / row.file).stat().st_size - tensorrt_builder_double.STREAMABLE
    assert others > 0
    assert row.least_weight_bytes == others + tensorrt_builder_double.SCRATCH
    assert row.device_memory_bytes == tensorrt_builder_double.DEVICE_MEMORY  # without what streams needs
    assert build_plans(Bundle(folder), BuildOptions(stream_weights=True), ["vae_decoder"]) == [row]
    (plain,) = build_plans(Bundle(folder), networks=["vae_decoder"])
    assert plain.least_weight_bytes is None
    assert len(built(trt)) == 2


@pytest.mark.parametrize(
    ("compatibility", "level", "part"),
    [("same-cc", "SAME_COMPUTE_CAPABILITY", "sm90"), ("ampere+", "AMPERE_PLUS", "ampere-plus")],
)
def test_plans_for_other_cards(trt: Any, folder: Path, compatibility: Any, level: str, part: str) -> None:
    (row,) = build_plans(Bundle(folder), BuildOptions(hardware_compatibility=compatibility), ["denoiser"])
    assert trt.configs[0].hardware_compatibility_level.name == level
    assert (row.target.label, f"-{part}-" in row.file) == (part, True)
    assert row.target.gpu == ""


def test_the_timing_cache_grows_beside_the_plans(trt: Any, folder: Path) -> None:
    build_plans(Bundle(folder))
    (cache,) = folder.glob("*.cache")
    assert cache.name == f"timing.trt{VERSION}-nvidia-any-80gb-float16.cache"
    keys = [entry.spec.key for entry in Bundle(folder).manifest.networks]
    assert cache.read_bytes().decode() == "".join(f"{key};" for key in keys)
    assert trt.called("IBuilderConfig.create_timing_cache")[3] == (f"{keys[0]};".encode(),)


def test_a_timing_cache_on_another_disk_and_of_another_gpu(
    trt: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, said, real = tmp_path / "mine", [], Path.replace
    cache.write_bytes(b"other GPU")

    def replace(path: Path, target: Path) -> Path:
        if (path.parent == tmp_path) != (target.parent == tmp_path):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    build_plans(Bundle(folder), networks=["denoiser"], timing_cache=cache, progress=said.append)
    assert any("is of another TensorRT or GPU" in line for line in said)
    assert cache.read_bytes().startswith(b"denoiser-")
    assert not list(folder.glob("*.cache"))
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_not_built_again(trt: Any, folder: Path) -> None:
    first = build_plans(Bundle(folder), networks=["denoiser", "vae_decoder"])
    said: list[str] = []
    assert build_plans(Bundle(folder), progress=said.append)[2:] == first
    assert [name.partition("-")[0] for name in built(trt)] == [
        "denoiser", "vae_decoder", "image_encoder", "vae_encoder"
    ]  # fmt: skip
    assert sum("is there already" in line for line in said) == 2


def test_other_options_replace_a_plan(trt: Any, folder: Path) -> None:
    build_plans(Bundle(folder))
    (row,) = build_plans(Bundle(folder), BuildOptions(optimization_level=5), ["denoiser"])
    assert len(built(trt)) == 5
    assert plans(folder)["denoiser"] == row
    assert row.optimization_level == 5
    assert len(Bundle(folder).manifest.plans) == 4


def test_a_plan_of_another_graph_is_built_again(trt: Any, folder: Path) -> None:
    build_plans(Bundle(folder), networks=["denoiser"])
    damage.edit(folder, lambda m: m["plans"][0].update(graph_sha256="0" * 64))
    build_plans(Bundle(folder), networks=["denoiser"])
    assert len(built(trt)) == 2


def test_a_damaged_plan_is_built_again(trt: Any, folder: Path) -> None:
    (row,) = build_plans(Bundle(folder), networks=["denoiser"])
    damage.flip(folder / row.file)
    assert build_plans(Bundle(folder), networks=["denoiser"]) == [row]
    Bundle(folder).check_hashes()
    assert len(built(trt)) == 2


def test_the_command(trt: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call(
        main, "tensorrt", folder, "--networks", "denoiser", "--networks", "vae_decoder",
        "--workspace", "512MiB", "--optimization-level", 4, "--timing-cache", tmp_path / "timings",
        "--stripped", "--hardware-compatibility", "same-cc", "--stream-weights",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    rows = plans(folder)
    assert tuple(rows) == ("denoiser", "vae_decoder")
    row = rows["denoiser"]
    assert (row.workspace_bytes, row.optimization_level, row.stripped) == (512 * 2**20, 4, True)
    assert row.least_weight_bytes is not None
    assert row.target.label == "sm90"
    assert (tmp_path / "timings").is_file()
    *files, last = out.splitlines()
    assert [line.partition(":")[0] for line in files] == [row.file for row in rows.values()]
    assert re.fullmatch(r"\d+ s, at most \d+\.\d GiB of memory", last)
    assert f"TensorRT {VERSION} (the one that is installed), for sm90" in err
    assert "denoiser-b1" in err
    assert "building, 1 of 2" in err
    assert (folder / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--workspace", "8"), 2, "workspace: expected a size such as 8GiB or 512MiB, got '8'"),
        (("--workspace", "0GiB"), 2, "workspace: expected a size"),
        (("--optimization-level", "6"), 2, "Invalid value for '--optimization-level'"),
        (("--networks", "unet"), 2, "network: expected image_encoder"),
        (("--hardware-compatibility", "all"), 2, "'all' is not one of"),
        (("--flavour", "openvino"), 2, "'openvino' is not one of"),
        (("--target", "portable"), 2, "target of TensorRT: expected here, got 'portable'"),
        (("--target", "sm89"), 2, "TensorRT for RTX (--flavour tensorrt-rtx) compiles for other cards."),
        (("--flavour", "tensorrt-rtx"), 1, f"Run: {install_line('tensorrt-rtx')}"),
        (("--timing-cache", "none/cache"), 1, "file none/cache: expected a file name in an existing folder"),
    ],
)
def test_wrong_arguments(
    trt: Any, folder: Path, capsys: pytest.CaptureFixture[str], arguments: Any, code: int, part: str
) -> None:
    assert call(main, "tensorrt", folder, *arguments) == code
    assert part in " ".join(capsys.readouterr().err.split())
    assert not list(folder.glob("*.plan"))


def test_sizes() -> None:
    assert (memory_bytes("8GiB"), memory_bytes("0.5 GiB"), memory_bytes("3MiB")) == (2**33, 2**29, 3 * 2**20)
