"""Names of diffusers' pipelines that an engine does without, and what does their work here.

What a user types out of habit becomes an error that names our way, instead of "has no attribute".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, Self

import torch

from svd_engine.arguments import DTYPES
from svd_engine.backends.choose import resolve
from svd_engine.errors import NotOffered
from svd_engine.residency.source import EngineSource
from svd_engine.spec.precision import DTYPE_OPTIONS
from svd_engine.steering import CALL_NAMES, no_call

_OPEN = "Open it with VideoEngine.from_checkpoint(CHECKPOINT, dtype=..., device=...), or from_bundle(BUNDLE)."
_SWAP = (
    "Leave it out: a call takes the fastest way that fits into what is free, or into an amount that the "
    'engine is opened with, memory="8GiB" say. swap_networks=True keeps one network in memory at a time.'
)
_MEMORY = (
    "Leave it out: attention never builds all scores at once. "
    'decoding="streamed" bounds the memory of the decoder.'
)
_NETWORKS = (
    "Leave it out: the engine optimises its networks itself. To change weights, pass the changed folder."
)

OUR_WAY = {
    "from_pretrained": _OPEN,
    "from_pipe": _OPEN,
    "to": "Open an engine like that: from_bundle takes device=, from_checkpoint device= and dtype=.",
    "enable_model_cpu_offload": _SWAP,
    "enable_sequential_cpu_offload": _SWAP,
    "enable_group_offload": _SWAP,
    "enable_attention_slicing": _MEMORY,
    "enable_vae_slicing": _MEMORY,
    "enable_vae_tiling": _MEMORY,
    "enable_xformers_memory_efficient_attention": _MEMORY,
    "unet": _NETWORKS,
    "vae": _NETWORKS,
    "image_encoder": _NETWORKS,
    "feature_extractor": _NETWORKS,
    "components": _NETWORKS,
    "scheduler": "Pass sampler=, schedule= or sigmas= to the call: another sampler, other noise levels.",
    "save_pretrained": "Copy the checkpoint's folder, or the bundle's: an engine changes neither.",
}


class DiffusersNames:
    """Answers to names that users of diffusers type: errors, but for what is true already."""

    source: EngineSource

    @property
    def device(self) -> torch.device:
        """Where networks run and latents lie."""
        return self.source.residency.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks' activations; sampler and boundary are float32 whatever it is."""
        return DTYPES[DTYPE_OPTIONS[self.source.precision.activations]]

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> NoReturn:
        """Raises NotOffered, which names `from_checkpoint` and `from_bundle`."""
        raise not_offered("from_pretrained")

    def to(
        self,
        *places: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The engine itself if it is on this device, in this type, already.  Raises NotOffered otherwise."""
        for place in (*places, device, dtype):
            if place is not None and not self._is_at(place):
                raise not_offered("to", f"{place}, and the engine was opened on {self.device}, {self.dtype}")
        return self

    def _is_at(self, place: object) -> bool:
        if isinstance(place, torch.dtype):
            return place == self.dtype
        return isinstance(place, (str, torch.device)) and resolve(place) == self.device

    if not TYPE_CHECKING:  # a type checker knows all the attributes that there are

        def __getattr__(self, name: str) -> NoReturn:
            if name in CALL_NAMES:  # its property found no call
                raise no_call()
            if name in OUR_WAY:
                raise not_offered(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def not_offered(name: str, got: str = "a name of diffusers' pipelines") -> NotOffered:
    """The error for a name out of OUR_WAY."""
    return NotOffered(f"VideoEngine.{name}", expected="what an engine offers", got=got, remedy=OUR_WAY[name])
