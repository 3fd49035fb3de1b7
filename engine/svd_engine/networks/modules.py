"""The torch modules of one checkpoint: what eager runs, torch.compile compiles and the exporter traces.

Each component is loaded on first use, into host memory, and shared by every network and profile that needs
it.  `residency` moves it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from svd_engine.checkpoint.opening import Checkpoint, Component
from svd_engine.errors import BackendUnavailable
from svd_engine.networks.decoder import ImageVaeDecoder, VaeDecoder
from svd_engine.networks.denoiser import Denoiser, GuidedDenoiser
from svd_engine.networks.encoders import ImageEncoder, VaeEncoder
from svd_engine.networks.rewrites import REWRITES, Applied, Rewrite, apply_rewrites, check_names
from svd_engine.networks.streamed_decoder import StreamedDecoder
from svd_engine.spec.precision import DType
from svd_engine.spec.profile import GuidanceMode
from svd_engine.spec.streaming import SEGMENT
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec
from svd_engine.spec.weights import WeightFile

REWRITTEN: tuple[Component, ...] = ("unet", "vae")
COMPONENT_OF: Mapping[str, Component] = {  # network -> what of a checkpoint it runs
    "image_encoder": "image_encoder",
    "vae_encoder": "vae",
    "denoiser": "unet",
    "shallow_denoiser": "unet",
    "vae_decoder": "vae",
    SEGMENT: "vae",
}
_WRAPPERS: Mapping[tuple[str, GuidanceMode | None], Callable[[nn.Module], nn.Module]] = {
    ("image_encoder", None): ImageEncoder,
    ("vae_encoder", None): VaeEncoder,
    ("denoiser", "single"): Denoiser,
    ("denoiser", "batched"): GuidedDenoiser,
    ("vae_decoder", None): VaeDecoder,
}
# of networks that one module serves, at any shape
_Kind = tuple[str, GuidanceMode | None, DType, int | None, int | None, int | None]


def wrap(spec: NetworkSpec, component: nn.Module) -> nn.Module:
    """A component, as a checkpoint has it, as the network of a row of the table: its tensors in and out."""
    if spec.kept:
        from svd_engine.networks.reuse import ReusingDenoiser  # diffusers' UNet is slow to import

        return ReusingDenoiser(component, spec.kept)
    if spec.segment is not None:
        from svd_engine.networks.decoder_segments import decoder_segment

        return decoder_segment(component, spec)
    slice_frames = spec.slice_frames if isinstance(spec, StreamedSpec) else None
    if spec.network == "vae_decoder" and hasattr(component, "post_quant_conv"):
        return ImageVaeDecoder(component, slice_frames)
    if slice_frames is not None:
        return StreamedDecoder(component, slice_frames)
    return _WRAPPERS[spec.network, spec.guidance](component)


class Modules:
    """Modules in the precision that a spec names, wherever `checkpoint` loads them.

    Raises SettingsError for a rewrite left out that is not among `rewrites`, before anything is loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        without_rewrites: Collection[str] = (),
        rewrites: Sequence[Rewrite] = REWRITES,
    ) -> None:
        check_names(without_rewrites, rewrites)
        self.checkpoint = checkpoint
        self.without_rewrites = without_rewrites
        self.rewrites = rewrites
        self.applied: dict[str, list[Applied]] = {}  # by component
        self.weight_files: dict[Component, tuple[WeightFile, ...]] = {}  # that were read
        self._components: dict[tuple[Component, DType], nn.Module] = {}
        self._networks: dict[_Kind, nn.Module] = {}

    def network(self, spec: NetworkSpec) -> nn.Module:
        """The module behind a row of the table, in eval mode; the same for every shape.

        Raises BackendUnavailable for a precision that torch modules cannot have.
        """
        precision = spec.precision
        if precision.weights != precision.activations:
            raise BackendUnavailable(
                f"torch modules of {spec.key} in {precision}",
                expected="weights and activations of one type",
                got=f"{precision.weights} and {precision.activations}",
                remedy='Use dtype="fp16", "bf16" or "fp32".',
            )
        slice_frames = spec.slice_frames if isinstance(spec, StreamedSpec) else None
        kind = (spec.network, spec.guidance, precision.weights, spec.kept, slice_frames, spec.segment)
        if kind not in self._networks:
            component = self._component(COMPONENT_OF[spec.network], precision.weights)
            self._networks[kind] = wrap(spec, component).eval()
        return self._networks[kind]

    def places(self) -> dict[str, int]:
        """How many places each rewrite found in what is loaded so far, by "component/rewrite"."""
        return {f"{part}/{a.name}": a.places for part, done in self.applied.items() for a in done}

    def release(self, spec: NetworkSpec) -> None:
        """Forgets the network and the weights under it, so that the next one can have the memory."""
        component = COMPONENT_OF[spec.network]
        self._networks = {k: m for k, m in self._networks.items() if COMPONENT_OF[k[0]] != component}
        self._components = {k: m for k, m in self._components.items() if k[0] != component}

    def close(self) -> None:
        """Forgets every network and all weights."""
        self._networks.clear()
        self._components.clear()

    def _component(self, component: Component, dtype: DType) -> nn.Module:
        if (component, dtype) not in self._components:
            module = self._load(component, getattr(torch, dtype))
            told = self.checkpoint.model.architecture.conditioning
            if component == "unet" and told.per_frame:
                from svd_engine.networks.rewrites._forwards import tell_per_frame  # slow to import

                tell_per_frame(module, [field.width for field in told.fields])
            if component in REWRITTEN:
                self.applied[component] = apply_rewrites(module, self.without_rewrites, self.rewrites)
            self._components[component, dtype] = module
        return self._components[component, dtype]

    def _load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        """Hashes the files in another thread while their tensors are read: one pass over the disk."""
        self.checkpoint.weights.files(component)  # from the hub: fetched once, before two threads read them
        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(self.checkpoint.weight_files, component)
            module = self.checkpoint.load(component, dtype)
            self.weight_files[component] = hashing.result()
        return module
