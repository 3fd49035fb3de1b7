"""Which files hold a component's weights: those that diffusers and transformers read, and no others.

By default these are the files without a variant; another variant is read when it is asked for by name.
Knows file names and hashes, and nothing of tensors.  A listing holds paths inside the checkpoint, such as
"unet/diffusion_pytorch_model.safetensors": of a folder, or of a repository that is not downloaded yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from svd_engine.errors import CheckpointError
from svd_engine.spec.weights import COMPONENTS, Component, WeightFile

STEMS: dict[Component, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "image_encoder": "model",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def candidates(component: Component, variant: str | None) -> tuple[str, ...]:
    """Names of the one file, or of the index of a sharded set, in the order in which they are looked for.

    diffusers takes an index before a single file (`ModelMixin.from_pretrained` in
    models/modeling_utils.py), transformers a single file before an index
    (`_get_resolved_checkpoint_files` in modeling_utils.py).  A variant stands after "index"; before it in
    what older diffusers wrote; and after the stem in sets that were renamed by hand, which both libraries
    pass over: these come last.
    """
    stem = STEMS[component]
    if variant is None:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        return (single, index) if component == "image_encoder" else (index, single)
    single, index = f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"
    older, renamed = f"{stem}.safetensors.{variant}.index.json", f"{stem}.{variant}.safetensors.index.json"
    if component == "image_encoder":
        return single, index, older, renamed
    return index, older, single, renamed


def choose(listing: Collection[str], component: Component, variant: str | None, where: str) -> str:
    """Path in the checkpoint of the component's one file, or of the index of its shards.

    A component that has no file of the variant is read without one, as `DiffusionPipeline.from_pretrained`
    does, but at least one component must have it.  `where` names the checkpoint in messages.
    Raises CheckpointError when there is no such file: another variant, or only pickles.
    """
    if variant is not None and not any(_has(listing, part, variant) for part in COMPONENTS):
        there = _variants(listing)
        raise CheckpointError(
            f"checkpoint {where}",
            expected=f"weight files of the variant {variant}",
            got=f"files of {' and '.join(there)} only" if there else "only files without a variant",
            remedy="Leave the variant out, or ask for one that is there.",
        )
    wanted = candidates(component, variant if variant and _has(listing, component, variant) else None)
    for name in wanted:
        if f"{component}/{name}" in listing:
            return f"{component}/{name}"
    raise _nothing_to_read(listing, component, wanted, where)


def shard_names(index: Path) -> list[str]:
    """Names of the files that an index lists, all beside it.  Raises CheckpointError for a broken index."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        problem = "" if names and all(Path(name).name == name for name in names) else ", ".join(names[:5])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        names = []
    if problem or not names:
        raise _broken_index(index, problem or "an empty one")
    return names


def shards(index: Path) -> list[Path]:
    """The files that an index lists.  Raises CheckpointError for a broken index or a missing file."""
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise _broken_index(index, f"no {', '.join(missing[:5])}")
    return [index.parent / name for name in names]


def describe_file(component: Component, file: Path) -> WeightFile:
    """Name, size and hash of a weight file; the hash is computed once for a file that does not change."""
    status = file.stat()
    sha256 = _sha256(file.resolve(), status.st_size, status.st_mtime_ns)
    return WeightFile(component=component, file=file.name, bytes=status.st_size, sha256=sha256)


def identify(component: Component, files: Iterable[Path]) -> Iterator[bytes]:
    """Bytes that differ whenever the names, sizes or contents of a component's files do."""
    for file in files:
        entry = describe_file(component, file)
        yield f"\0{component}/{entry.file} {entry.bytes} {entry.sha256}".encode()


def present(file: Path) -> Path:
    """The file itself.  Raises CheckpointError when it went away since the checkpoint was opened."""
    if not file.is_file():
        raise CheckpointError(
            str(file),
            expected="the weight file that was there when the checkpoint was opened",
            got="no such file",
            remedy="Bring it back, or check the network and open the checkpoint again.",
        )
    return file


@lru_cache(maxsize=256)
def _sha256(file: Path, _size: int, _changed_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _has(listing: Collection[str], component: Component, variant: str) -> bool:
    """Whether any file of the component, readable or not, names the variant."""
    inside = [path for path in listing if path.startswith(f"{component}/")]
    return any(f".{variant}." in path or f".{variant}-" in path for path in inside)


def _variants(listing: Collection[str]) -> list[str]:
    """Variants of which there are safetensors files."""
    found = set()
    for component in COMPONENTS:
        stem = f"{component}/{STEMS[component]}"
        for path in listing:
            if path.startswith(stem) and path.endswith(".safetensors"):
                middle = path.removeprefix(stem).removesuffix(".safetensors")
                found |= {part.partition("-")[0] for part in middle.split(".")[1:]}
    return sorted(found)


def _nothing_to_read(
    listing: Collection[str], component: Component, wanted: Collection[str], where: str
) -> CheckpointError:
    pickles = sorted(
        path.removeprefix(f"{component}/")
        for path in listing
        if path.startswith(f"{component}/") and path.endswith(PICKLES)
    )
    expected = " or ".join(wanted)
    others = _variants([path for path in listing if path.startswith(f"{component}/")])
    if others:
        first = others[0]
        got = f"files of the variant {' and '.join(others)} only"
        remedy = f'Use variant="{first}".'
    elif pickles:
        expected = "safetensors"
        got = f"pickles only ({', '.join(pickles[:5])}), which can run code when read"
        remedy = (
            "Convert them where you trust them: load the pipeline with diffusers and call "
            "save_pretrained(folder, safe_serialization=True)."
        )
    else:
        got, remedy = "neither", "Download the checkpoint again with all its parts, or pass another one."
    return CheckpointError(f"weights in {where}/{component}", expected=expected, got=got, remedy=remedy)


def _broken_index(index: Path, got: str) -> CheckpointError:
    return CheckpointError(
        str(index),
        expected="a weight_map to files beside it",
        got=got,
        remedy="Download the checkpoint again with all its parts.",
    )
