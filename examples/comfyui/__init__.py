"""svd-engine's nodes for ComfyUI: load, generate, denoise only, free memory."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
