"""The list of a call's parameters, and everything that is made from it or held to it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import typer.main

from svd_engine import VideoEngine, request
from svd_engine.cli.main import app
from svd_engine.errors import SettingsError
from svd_engine.request import PARAMETERS, SETTINGS, OneOf, Parameter, Real, Seed, Whole
from svd_engine.sampling.registry import GUIDERS, SAMPLERS, SCHEDULES
from svd_engine.serving.triton.inputs import CALL, FORMS
from tests.support.paths import ROOT

OPTIONS = {p.option: p for p in PARAMETERS if p.option}
CPP = (ROOT / "examples/cpp/svd_generate.cpp").read_text()
CPP_DEFAULTS = (ROOT / "examples/cpp/svd.hpp").read_text()
TRITON_PAGE = (ROOT / "docs/triton.md").read_text()
EMBEDDING_PAGE = (ROOT / "docs/embedding.md").read_text()


def of(name: str) -> Parameter:
    return next(p for p in PARAMETERS if p.name == name)


# The list itself


def test_every_parameter_is_described() -> None:
    assert [(p.name, p.field) for p in SETTINGS if not (p.name and p.field)] == []
    assert len({p.name for p in PARAMETERS}) == len(PARAMETERS)
    for parameter in PARAMETERS:
        line = parameter.describe()
        assert re.fullmatch(r"[A-Z][^\n]+\.", line)
        assert ".." not in line


def test_a_line_says_unit_range_and_whose_default() -> None:
    assert (
        of("height").describe() == "Height of the video (pixels). Default: the bundle's or checkpoint's own."
    )
    assert of("motion_bucket_id").describe().endswith("(0 to 1023).")
    assert of("max_guidance_scale").describe().endswith("Default: the model's own (SVD: 3).")
    assert of("num_inference_steps").describe() == "Denoising steps. Default: the model's own (SVD: 25)."
    assert of("decode_chunk_size").describe() == "Frames decoded at once; fewer take less memory."
    assert of("guider").describe().endswith("Default: the model's own (SVD: linear).")


def test_a_call_is_checked_before_anything_is_opened() -> None:
    call = {p.name: p.call_default for p in PARAMETERS}
    request.check(call)
    for wrong in ({"seed": -1}, {"num_frames": 0}, {"fit": "cover"}, {"sigmas": [1.0]}, {"fps": 2.5}):
        with pytest.raises(SettingsError, match=f"^{next(iter(wrong))}: expected"):
            request.check({**call, **wrong})


TOGETHER = [
    ({"sigmas": [2.0, 0.0], "schedule": "ays"}, "schedule", "sigmas"),
    ({"sigmas": [2.0, 0.0], "rho": 5}, "rho", "sigmas"),
    ({"guidance_scales": [1.0], "guider": "triangle"}, "guider", "guidance_scales"),
    ({"guidance_scales": [1.0], "min_guidance_scale": 1.0}, "min_guidance_scale", "guidance_scales"),
    ({"guidance_scales": [1.0], "max_guidance_scale": 1.0}, "max_guidance_scale", "guidance_scales"),
    ({"sampler": "lms", "churn": 1.0}, "churn", "the sampler lms"),
    ({"schedule": "exponential", "rho": 7.0}, "rho", "the schedule exponential"),
    ({"decoding": "whole", "decode_chunk_size": 2}, "decode_chunk_size", "the decoding whole"),
    ({"guider": "constant", "min_guidance_scale": 2.0}, "min_guidance_scale", "the guider constant"),
]


@pytest.mark.parametrize(("call", "name", "beside"), TOGETHER)
def test_no_parameter_is_swallowed(call: dict[str, Any], name: str, beside: str) -> None:
    """What another one would leave without effect is refused; at its default it says nothing."""
    with pytest.raises(
        SettingsError, match=f"^{name}: expected its default beside {beside}, which"
    ) as caught:
        request.check(call)
    assert caught.value.remedy == "Leave out one of the two."
    request.check({**call, name: of(name).call_default})


def test_parameters_that_go_together() -> None:
    request.check({"sampler": "heun", "churn": 5.0, "schedule": "karras", "rho": 5.0, "guider": "triangle"})
    request.check({"sampler": "dpmpp-2m", "sigmas": [2.0, 0.0], "guidance_scales": [1.0, 2.0]})


# The names


def test_the_names_stay_and_the_page_has_them() -> None:
    """They are in scripts.  The page's rows: kind, name, evaluations a step, what it is."""
    assert [list(table) for table in (SAMPLERS, SCHEDULES, GUIDERS)] == [
        ["euler", "heun", "euler-ancestral", "dpmpp-2m", "dpmpp-2s-ancestral", "lms", "lcm"],
        ["karras", "exponential", "ays", "lcm"],
        ["linear", "constant", "triangle", "trapezoid"],
    ]
    page = (ROOT / "docs/samplers.md").read_text()
    for name, sampler in SAMPLERS.items():
        assert f"| sampler | `{name}` | {sampler.evaluations} | {sampler.help} |" in page
    for kind, table in (("schedule", SCHEDULES), ("guider", GUIDERS)):
        for name, entry in table.items():
            assert f"| {kind} | `{name}` | | {entry.help} |" in page


# Python


ONLY_IN_PYTHON = {
    "self", "generator", "output_type", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "return_dict", "cancel", "observer",
}  # fmt: skip


def test_the_call_has_every_parameter_and_its_default() -> None:
    arguments = dict(inspect.signature(VideoEngine.__call__).parameters)
    for name in ONLY_IN_PYTHON:
        del arguments[name]
    assert arguments.pop("image").default is inspect.Parameter.empty
    listed = {p.name: p.call_default for p in PARAMETERS if p.name not in ("image", "seed")}
    assert {name: argument.default for name, argument in arguments.items()} == listed


# The command


def test_the_command_has_every_option_its_default_and_its_line() -> None:
    command: Any = typer.main.get_command(app)
    named = {p.name for p in OPTIONS.values()}
    options = {o.opts[-1]: o for o in command.commands["generate"].params if o.name in named}
    assert options.keys() == OPTIONS.keys()
    for name, option in options.items():
        assert (option.help, option.default) == (OPTIONS[name].describe(), OPTIONS[name].call_default)


def test_the_names_of_the_options_stay() -> None:
    """They are in scripts: a name that changes here breaks them."""
    assert set(OPTIONS) == {
        "--frames", "--height", "--width", "--fit", "--steps", "--seed", "--fps", "--motion-bucket-id",
        "--noise-aug-strength", "--min-guidance-scale", "--max-guidance-scale", "--decode-chunk-size",
        "--num-videos", "--sampler", "--schedule", "--guider", "--churn", "--rho", "--sigmas",
        "--guidance-scales", "--decoding", "--elevation", "--azimuths",
    }  # fmt: skip


# Triton


def test_triton_takes_every_parameter() -> None:
    assert [tensor.name for tensor in CALL] == [p.name for p in PARAMETERS]
    assert [tensor.name for tensor in CALL if not tensor.optional] == ["image"]


def test_the_page_on_triton_has_every_input_and_its_type() -> None:
    shown = {}
    for names, kind in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\w+)", TRITON_PAGE, re.MULTILINE):
        shown |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind)
    for parameter in PARAMETERS[1:]:  # the photograph is above the table
        datatype = FORMS[type(parameter.kind)][0].removeprefix("TYPE_")
        assert shown[parameter.name] == {"STRING": "BYTES"}.get(datatype, datatype), parameter.name


# C++


ELSEWHERE_IN_CPP = {"--num-videos"}  # a video a run
LACKING_IN_CPP = {  # it has the defaults alone
    "--sampler", "--schedule", "--guider", "--churn", "--rho", "--sigmas", "--guidance-scales", "--decoding",
    "--elevation", "--azimuths",
}  # fmt: skip


def test_the_cpp_host_has_the_command_s_options() -> None:
    known = re.search(r"known\{(.*?)\};", CPP, re.DOTALL)
    assert known
    options = set(re.findall(r'"(--?[\w-]+)"', known[1]))
    offered = set(OPTIONS) - ELSEWHERE_IN_CPP - LACKING_IN_CPP
    assert options - {"-o", "--noise", "--provider", "--runtime"} == offered
    usage = CPP.split('R"(')[1].split(')"')[0]
    assert {name for name in options if name not in usage} == set()


def test_what_the_cpp_host_lacks_is_said_and_is_the_default() -> None:
    page = (ROOT / "examples/cpp/README.md").read_text()
    assert set(re.findall(r"`(--[\w-]+)`", page)) >= LACKING_IN_CPP
    defaults = {name: of(name).default for name in ("sampler", "schedule", "guider", "churn")}
    assert defaults == {"sampler": "euler", "schedule": "karras", "guider": "linear", "churn": 0.0}
    for name in ("sampler", "schedule", "guider"):
        assert f"`{defaults[name]}`" in page
        assert f"`{defaults[name]}`" in EMBEDDING_PAGE


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - ELSEWHERE_IN_CPP - LACKING_IN_CPP))
def test_the_cpp_host_has_the_ranges(name: str) -> None:
    kind = OPTIONS[name].kind
    reads = [re.split(r",\s*", read) for read in re.findall(rf'\.\w+\("{name}", ([^()]*)\)', CPP)]
    limits = [read[1:] for read in reads]
    match kind:
        case Whole():
            assert limits == [[str(kind.low)]]
        case Real(low=None):
            assert limits == [["any"]]
        case Real(high=None):
            assert limits == [[f"{kind.low}"]]
        case Real():
            assert limits == [[f"{kind.low}", f"{kind.high}"]]
        case Seed():
            assert limits == [["0", "UINT64_MAX"]]
        case OneOf():
            refused = re.search(r"if \((fit != .*?)\)", CPP)
            assert refused
            assert re.findall(r'"(\w+)"', refused[1]) == list(kind.choices)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("num_inference_steps", "steps"), ("fps", "fps"), ("motion_bucket_id", "motion_bucket"),
        ("noise_aug_strength", "noise_aug"),
    ],
)  # fmt: skip
def test_the_cpp_host_has_the_defaults(name: str, field: str) -> None:
    given = re.findall(rf"\b{field} = ([\d.]+)F?[,;]", CPP_DEFAULTS)
    assert [float(value) for value in given] == [of(name).default]
    shown = re.search(rf"{of(name).option} [A-Z] +(?:the bundle's own \(SVD: )?(?:.*?)([\d.]+)", CPP)
    assert shown
    assert float(shown[1]) == of(name).default


def test_the_cpp_host_has_the_guidance_of_svd() -> None:
    for name in ("min_guidance_scale", "max_guidance_scale"):
        assert f'"{name}", {of(name).default:.1f}f)' in CPP_DEFAULTS
        assert re.search(rf"{of(name).option} X +the bundle's own \(SVD: {of(name).default:g}\)", CPP)


# The page for other hosts


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("steps", "num_inference_steps"), ("frames per second", "fps"),
        ("motion bucket", "motion_bucket_id"), ("noise augmentation", "noise_aug_strength"),
    ],
)  # fmt: skip
def test_the_page_on_embedding_has_default_and_range(label: str, name: str) -> None:
    row = re.search(rf"^\| {label} \| (.*?) \|$", EMBEDDING_PAGE, re.MULTILINE)
    assert row
    kind: Any = of(name).kind
    ends = [end for end in (kind.low, getattr(kind, "high", None)) if end is not None]
    assert [float(n) for n in re.findall(r"\d+(?:\.\d+)?", row[1])] == [of(name).default, *ends]
