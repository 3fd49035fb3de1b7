"""Write manifest_schema.hpp: what svd-engine's manifests must be, for the C++ host.

Run it when the manifest's schema changes: python examples/cpp/manifest_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from svd_engine.bundle.manifest import Manifest

HEADER = Path(__file__).with_name("manifest_schema.hpp")
SAID = ("title", "description", "default")  # for readers, not for checks
NAMED = ("properties", "$defs")  # whose keys are names of ours, not words of the schema


def checks(schema: Any) -> Any:
    """A schema without what it only says."""
    if isinstance(schema, list):
        return [checks(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        word: {name: checks(one) for name, one in value.items()} if word in NAMED else checks(value)
        for word, value in schema.items()
        if word not in SAID
    }


def header() -> str:
    text = json.dumps(checks(Manifest.model_json_schema()), separators=(",", ":"))
    return (
        "// Written by manifest_schema.py from svd_engine.bundle.manifest: do not edit.\n"
        "#pragma once\n\nnamespace svd {\n\n"
        f'inline constexpr char manifest_schema[] = R"json({text})json";\n\n'
        "}  // namespace svd\n"
    )


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
