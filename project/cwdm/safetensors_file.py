"""Safetensors files, written whole and in little memory."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cwdm.files import write_atomically

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    before: Callable[[str], None] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, one tensor after the other.

    The library makes one string of bytes of all of them, or takes a path and leaves half a file there when killed.

    Args:
        before: told the file's sha256 before it has its name.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned, as the library does
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape, dtype = list(tensors[name].shape), _NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for piece in pieces():
            file.write(piece)
            if before:
                digest.update(piece)
        if before:
            before(digest.hexdigest())

    write_atomically(path, write)
