"""What every document and every message to a child process is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Frozen; refuses a field that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
