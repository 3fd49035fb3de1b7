"""The memory tiers and the cards in them, as data, each figure with its source.  Knows no measurement.

`flops` is the peak of fp16 tensor cores with fp32 accumulation, dense: SVD's attention overflows with
less, and no SVD checkpoint has 2:4 sparse weights.  GeForce cards run fp32 accumulation at half the rate
of fp16 accumulation, and data sheets print the larger figure, often doubled again for sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svd_engine.errors import SettingsError


@dataclass(frozen=True)
class Tier:
    name: str
    gigabytes: int  # the smallest memory that counts in it; NVIDIA's GB are 2**30 bytes


TIERS = (
    Tier("8", 8), Tier("12", 12), Tier("16", 16), Tier("24", 24),
    Tier("40/48", 40), Tier("80", 80), Tier("141", 141),
)  # fmt: skip


# FLOP a clock and multiprocessor, from the chips' whitepapers: of fp16 tensor cores with fp32 accumulation
# (half on GeForce), and of float32 cores.
CLOCK_FLOP = {
    "7.0": (1024, 128), "7.5": (1024, 128), "8.0": (2048, 128), "8.6": (1024, 256), "8.9": (1024, 256),
    "9.0": (4096, 256), "12.0": (1024, 256),
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    name: str
    devices: tuple[str, ...]  # what the driver calls it
    memory: int  # GB
    compute_capability: str
    bandwidth: float  # bytes a second
    flops: float  # a second: fp16 with fp32 accumulation, dense
    source: str
    half_rate: bool = False  # fp16 accumulation runs at twice `flops`
    low_power: int | None = None  # watts of a board that cannot hold its boost clock under such work

    @property
    def tier(self) -> Tier:
        """The largest tier that its memory fills: 32 GB count as 24, 11 GB as 8."""
        return max((t for t in TIERS if t.gigabytes <= self.memory), key=lambda t: t.gigabytes)

    @property
    def target(self) -> str:
        """What TensorRT's compilers call its kind: sm89."""
        return "sm" + self.compute_capability.replace(".", "")

    def rate(self, accumulation: Literal["fp16", "fp32"]) -> float:
        """FLOP a second of half-precision products, by the type of their sums."""
        return self.flops * 2 if self.half_rate and accumulation == "fp16" else self.flops

    @property
    def float32_flops(self) -> float:
        """A second, of float32 products without TF32: those of the ordinary cores."""
        tensor_cores, cores = CLOCK_FLOP[self.compute_capability]
        return self.flops * cores / (tensor_cores / 2 if self.half_rate else tensor_cores)


def _card(
    name: str,
    memory: int,
    capability: str,
    gigabytes_a_second: float,
    tflops: float,
    source: str,
    devices: tuple[str, ...] = (),
    low_power: int | None = None,
) -> Card:
    return Card(
        name,
        devices or (f"NVIDIA {name}",),
        memory,
        capability,
        gigabytes_a_second * 1e9,
        tflops * 1e12,
        source,
        half_rate=name.startswith("GeForce"),
        low_power=low_power,
    )


def _geforce(
    name: str, memory: int, capability: str, gigabytes_a_second: float, multiprocessors: int, ghz: float
) -> Card:
    """From clock and multiprocessors (SMs): 512 FLOP a clock and SM, as these chips' whitepapers print."""
    source = f"NVIDIA's {name} specifications: {multiprocessors} SMs x {ghz:.3f} GHz boost x 512 FLOP"
    tflops = multiprocessors * ghz * 512 / 1e3
    return _card(name, memory, capability, gigabytes_a_second, tflops, source)


VOLTA = "NVIDIA V100 datasheet"
TURING = "NVIDIA Turing GPU Architecture whitepaper"
GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
A100 = "NVIDIA A100 datasheet"
H100 = "NVIDIA H100 datasheet, half of the figure with sparsity"
H200 = "NVIDIA H200 datasheet, half of the figure with sparsity"

CARDS = (
    _card("GeForce RTX 2080 Ti", 11, "7.5", 616, 53.8, TURING),
    _geforce("GeForce RTX 3070", 8, "8.6", 448, 46, 1.725),
    _geforce("GeForce RTX 3080", 10, "8.6", 760, 68, 1.710),
    _geforce("GeForce RTX 4060", 8, "8.9", 272, 24, 2.460),
    _geforce("GeForce RTX 3060", 12, "8.6", 360, 28, 1.777),
    _geforce("GeForce RTX 4070", 12, "8.9", 504, 46, 2.475),
    _card("T4", 16, "7.5", 320, 65, TURING, ("Tesla T4",), low_power=70),
    _card("V100 SXM2 16GB", 16, "7.0", 900, 125, VOLTA, ("Tesla V100-SXM2-16GB",)),
    _geforce("GeForce RTX 4060 Ti", 16, "8.9", 288, 34, 2.535),
    _geforce("GeForce RTX 4080", 16, "8.9", 716.8, 76, 2.505),
    _geforce("GeForce RTX 5080", 16, "12.0", 960, 84, 2.617),
    _card("GeForce RTX 3090", 24, "8.6", 936, 71, GA102),
    _card("GeForce RTX 4090", 24, "8.9", 1008, 165.2, ADA),
    _card("GeForce RTX 5090", 32, "12.0", 1792, 209.5, BLACKWELL),
    _card("A10", 24, "8.6", 600, 125, "NVIDIA A10 datasheet"),
    _card("L4", 24, "8.9", 300, 121, "NVIDIA L4 datasheet, half of the figure with sparsity", low_power=72),
    _card("A100 40GB", 40, "8.0", 1555, 312, A100, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    _card("RTX A6000", 48, "8.6", 768, 154.8, GA102),
    _card("L40S", 48, "8.9", 864, 362.05, "NVIDIA L40S datasheet"),
    _card("A100 80GB PCIe", 80, "8.0", 1935, 312, A100),
    _card("A100 80GB SXM", 80, "8.0", 2039, 312, A100, ("NVIDIA A100-SXM4-80GB",)),
    _card("H100 PCIe", 80, "9.0", 2000, 756.5, H100),
    _card("H100 SXM", 80, "9.0", 3350, 989.5, H100, ("NVIDIA H100 80GB HBM3",)),
    _card("H200 SXM", 141, "9.0", 4800, 989.5, H200, ("NVIDIA H200",)),
)


def card_named(name: str) -> Card:
    """By our name or the driver's.  Raises SettingsError for a card that is not in the data."""
    for card in CARDS:
        if name == card.name or name in card.devices:
            return card
    raise SettingsError(
        f"card {name!r}",
        expected="one of " + ", ".join(card.name for card in CARDS),
        got=repr(name),
        remedy="Add it with its datasheet's figures to svd_bench/cards/cards.py.",
    )
