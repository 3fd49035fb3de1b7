"""What manifests and reports say of where weights came from.  Reads no file."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Component = Literal["unet", "vae", "image_encoder"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
Family = Literal["svd", "svd-xt", "sv3d-u", "sv3d-p", "small"]


class WeightFile(BaseModel):
    """One file that weights were read from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    component: Component
    file: str  # name in the component's folder
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class LoraFile(BaseModel):
    """A LoRA that was fused into the UNet."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str  # as the user named it
    scale: Annotated[float, Field(allow_inf_nan=False)]  # that the user gave, beside the file's own alpha
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    fused: Annotated[int, Field(ge=1)]  # weights that it changes
    left: Annotated[int, Field(ge=0)]  # keys that fit no weight, which the user accepted
