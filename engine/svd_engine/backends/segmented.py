"""A bundle's streamed decoder: its segments, run one after the other over slices of frames.

One segment is open at a time: an open one keeps buffers of its inputs and outputs, and all of them together
take as much as the activations of the whole decoder, in whose place they would be.  Between two segments the
activations of all frames are parked in host memory, each segment's in place of those that it read where they
are of one size.  `spec.streaming` says what the segments are, and what they hand each other.

Letters in shapes: n frames of a slice, r frames on either side of it, F frames of the video, C channels,
G groups, h w their pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from svd_engine.arguments import dtype_name
from svd_engine.spec.network import Backend, Network, OnPart, Placement, unheard
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec

Statistics = tuple[Tensor, Tensor]  # mean and variance [G] of a video


class SegmentedDecoder(Network):
    """Latent of all F frames of one video [F,4,h,w] -> frames [F,3,H,W], as the decoder of all frames.

    segments: the chain, in its order.  backend: opens them.
    """

    def __init__(self, spec: StreamedSpec, segments: Sequence[NetworkSpec], backend: Backend) -> None:
        detail = f"streamed, {spec.slice_frames} frames at a time"
        super().__init__(
            spec, Placement(backend.name, str(backend.device), str(spec.precision), f"{detail}, not opened")
        )
        self.segments, self.backend = segments, backend
        self.detail, self.slice_frames, self.frames = detail, spec.slice_frames, spec.inputs[0].shape[0]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.run_in_parts(inputs, unheard)

    def run_in_parts(self, inputs: Mapping[str, Tensor], on_part: OnPart) -> dict[str, Tensor]:
        """A part is a run of a segment."""
        head, front, *layers, finish = self.segments
        parts = 2 + ceil(self.frames / self.slice_frames) * (1 + len(layers))
        numbers = iter(range(1, parts + 1))

        def ran() -> None:
            on_part(next(numbers), parts)

        with self._opened(head) as network:
            x = self._parked(head.outputs[0].shape[1:], head.outputs[0].dtype)
            x.copy_(network(**inputs)["y"], non_blocking=True)
            ran()
        x, first = self._over_slices(ran, front, x)
        for moments, layer in zip(layers[::2], layers[1::2], strict=True):
            told = {"mean1": first[0], "variance1": first[1]}
            _, second = self._over_slices(ran, moments, x, told)
            told |= {"mean2": second[0], "variance2": second[1]}
            x, first = self._over_slices(ran, layer, x, told)
        with self._opened(finish) as network:
            frames = network(images=x.to(self.backend.device))
            ran()
            return frames

    @contextmanager
    def _opened(self, segment: NetworkSpec) -> Iterator[Network]:
        network = self.backend.open(segment)
        self.placement = replace(network.placement, detail=f"{network.placement.detail}, {self.detail}")
        try:
            yield network
        finally:
            network.close()

    def _over_slices(
        self,
        ran: Callable[[], None],
        segment: NetworkSpec,
        x: Tensor,
        told: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Statistics]:
        """What a segment makes of parked activations x [F,h,w,C], and the statistics of its moments.

        One that only takes moments leaves x as it is; the last layer has none to take.
        `ran` is called after each slice.
        """
        left = next((tensor for tensor in segment.outputs if tensor.name in ("y", "images")), None)
        y = x
        if left is not None and (left.shape[1:], left.dtype) != (x.shape[1:], dtype_name(x.dtype)):
            y = self._parked(left.shape[1:], left.dtype)
        means: list[Tensor] = []
        variances: list[Tensor] = []
        with self._opened(segment) as network:
            for start, given in self._windows(network, x):
                outputs = network(**given, **(told or {}))
                count = min(self.slice_frames, self.frames - start)
                if left is not None:
                    y[start : start + count].copy_(outputs[left.name][:count], non_blocking=True)
                if "mean" in outputs:
                    means.append(outputs["mean"][:count].double())
                    variances.append(outputs["variance"][:count].double())
                ran()
        return y, of_video(means, variances)

    def _windows(self, network: Network, x: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Each slice's first frame, and the inputs that a segment takes of it.

        Frames that two windows share stay on the device.
        """
        size, window = self.slice_frames, network.input_buffer("x")
        reach = (len(window) - size) // 2
        for start in range(0, self.frames, size):
            kept = 2 * reach if start else reach  # before the first frame there are zeros
            for place in range(2 * reach if start else 0):
                window[place].copy_(window[place + size])
            for place in range(kept, min(len(window), self.frames - start + reach)):
                window[place].copy_(x[start - reach + place], non_blocking=True)
            given = {"x": window}
            if any(tensor.name == "inside" for tensor in network.spec.inputs):
                places = torch.arange(len(window)) + start - reach
                inside = (places >= 0) & (places < self.frames)
                given["inside"] = inside.float()[:, None, None, None].to(window.device)
            yield start, given

    def _parked(self, frame: Sequence[int], dtype: str) -> Tensor:
        """Room in host memory for all frames; page-locked beside a GPU, which copies on its own then."""
        pinned = self.backend.device.type == "cuda"
        return torch.empty((self.frames, *frame), dtype=getattr(torch, dtype), pin_memory=pinned)


def of_video(means: Sequence[Tensor], variances: Sequence[Tensor]) -> Statistics:
    """Mean and variance [G] of all frames, of those of each frame [n,G] in slices, float64; float32.

    Of no slices it is a pair of nothing.
    """
    if not means:
        return torch.empty(0), torch.empty(0)
    of_frames, within = torch.cat(list(means)), torch.cat(list(variances))  # [F, G]
    mean = of_frames.mean(0)
    return mean.float(), (within.mean(0) + (of_frames - mean).square().mean(0)).float()
