"""A model's weights as a short text: names, sizes, safetensors headers, sampled bytes, configuration files.

Reads a few MiB however large the model is. It tells apart what differs in a header, a size or a sampled page; a change of single
weights in place between two samples it does not see (raise `model_fingerprint` in the configuration, or clear the store).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
SAMPLES = 32
SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 100 << 20

Signature = tuple[tuple[str, int, int, int], ...]  # (path, bytes, time of change in ns, inode) of each file


def of_directory(directory: Path) -> str | None:
    """None when there are no weights in it."""
    digest = hashlib.sha256()
    weights = 0
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(directory).as_posix()
        if path.suffix in WEIGHT_SUFFIXES:
            _add(digest, f"{name}:{of_file(path)}")
            weights += 1
        elif path.suffix == ".json" and ("config" in path.name or path.name.endswith(".index.json")):
            _add(digest, f"{name}:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    return digest.hexdigest() if weights else None


def of_file(path: Path) -> str:
    """Size, header and evenly spaced samples of one weight file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _add(digest, str(size))
        if path.suffix == ".safetensors" and size >= 8:
            header_bytes = int.from_bytes(file.read(8), "little")
            _add(digest, hashlib.sha256(file.read(min(header_bytes, MAX_HEADER_BYTES))).hexdigest())
        last = max(0, size - SAMPLE_BYTES)
        for index in range(SAMPLES):
            file.seek(last * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def signature(path: Path) -> Signature:
    """Of the file `path`, or of the files below it: changes when one is replaced or written. Empty: nothing can be read."""
    try:
        return tuple(
            (str(found), status.st_size, status.st_mtime_ns, status.st_ino)
            for found in (path, *sorted(path.rglob("*")))
            if stat.S_ISREG((status := found.stat()).st_mode)
        )
    except OSError:
        return ()


def of_model(model: str, revision: str | None, download_dir: str | None) -> str | None:
    """Of what vLLM loads for `model`: a directory, a file, or a hub name that is in the local cache. None: not found."""
    path = Path(model)
    if path.is_dir():
        return of_directory(path)
    if path.is_file():
        return of_file(path)
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        found = hub.snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True)
        return of_directory(Path(found))
    except (ImportError, OSError, ValueError):
        return None


def _add(digest: Any, text: str) -> None:
    encoded = text.encode()
    digest.update(len(encoded).to_bytes(8, "little") + encoded)
