"""The published checkpoints: how they are read, and the one place that knows the names in them.

They carry tensors and nothing else, so the architecture is read off names and shapes.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cwdm.blocks import ResBlock
from cwdm.errors import WeightsError, listed
from cwdm.unet import SkipBody, UNet, UNetConfig

if TYPE_CHECKING:
    from cwdm.wavunet import WaveletBody

PUBLISHED_CT = "lidc-idri_"
"""How the names of WDM's files begin that were trained on CT, those to download and those of its training code."""


def read_tensors(path: Path) -> Mapping[Any, Any]:
    """State dict of a published file, which runs no code from it.

    Raises:
        WeightsError: damaged, no state dict, tensors of another kind or larger than the file, or more than tensors.
    """
    tensors = _read_pickle(path)
    if not isinstance(tensors, Mapping):
        raise WeightsError(f"expected a state dict, found a {type(tensors).__name__}")
    odd = [
        str(name)
        for name, value in tensors.items()
        if isinstance(value, Tensor)
        and (value.is_nested or value.layout is not torch.strided or value.device.type != "cpu")
    ]
    if odd:
        raise WeightsError(f"expected plain tensors, found sparse or nested ones, or some without data: {listed(odd)}")
    claimed = sum(value.nbytes for value in tensors.values() if isinstance(value, Tensor))
    if claimed > 2 * path.stat().st_size:  # a block under two names is stored once and counted twice
        raise WeightsError(f"its tensors claim {claimed:,} bytes, more than the file holds; refused")
    return tensors


def _read_pickle(path: Path) -> Any:
    """A `torch.save` file, tensors only: `weights_only` runs no code from the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise WeightsError("compressed entries, which PyTorch never writes; refused")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            "the file asks to run code or holds more than tensors, so it was refused; "
            f"save the plain state dict, best as safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (WeightsError, OSError):
        raise
    except Exception as error:  # what a damaged pickle can raise has no end
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"not a whole PyTorch weights file ({reason}); copy or download it again") from error


def published_names(model: UNet) -> dict[str, str]:
    """Published tensor name -> name of the same tensor in `model`.

    A block that the WavU-Net runs twice stands under two published names; both map to the one tensor, and the
    later of the two comes later in the dictionary.
    """
    return {
        f"{published}.{suffix}": f"{ours}.{suffix}"
        for published, ours in _published_modules(model)
        for suffix in ("weight", "bias")
    }


def _published_modules(model: UNet) -> Iterator[tuple[str, str]]:
    yield from (("time_embed.0", "time_embed.0"), ("time_embed.2", "time_embed.1"))
    yield "input_blocks.0.0", "stem"
    body = model.body
    blocks = _skip_blocks(body) if isinstance(body, SkipBody) else _wavelet_blocks(body)
    for published, ours in blocks:
        module = model.get_submodule(ours)
        yield from _res_block(published, ours, module) if isinstance(module, ResBlock) else [(published, ours)]
    yield from (("out.0", "head.norm"), ("out.2", "head.conv"))


def _res_block(published: str, ours: str, block: ResBlock) -> Iterator[tuple[str, str]]:
    yield f"{published}.in_layers.0", f"{ours}.first.norm"
    yield f"{published}.in_layers.2", f"{ours}.first.conv"
    yield f"{published}.emb_layers.1", f"{ours}.shift"
    yield f"{published}.out_layers.0", f"{ours}.second.norm"
    yield f"{published}.out_layers.3", f"{ours}.second.conv"
    if isinstance(block.shortcut, nn.Conv3d):
        yield f"{published}.skip_connection", f"{ours}.shortcut"


def _skip_blocks(body: SkipBody) -> Iterator[tuple[str, str]]:
    for i in range(len(body.encoder)):
        yield f"input_blocks.{i + 1}.0", f"body.encoder.{i}"
    yield from ((f"middle_block.{i}", f"body.middle.{i}") for i in range(len(body.middle)))
    entry = 0
    for level, blocks in enumerate(body.decoder):
        for i, block in enumerate(cast(nn.ModuleList, blocks)):
            if block.resample == "up":
                # In the published list the block that doubles the size shares an entry with the one before it.
                yield f"output_blocks.{entry - 1}.1", f"body.decoder.{level}.{i}"
            else:
                yield f"output_blocks.{entry}.0", f"body.decoder.{level}.{i}"
                entry += 1


def _wavelet_blocks(body: "WaveletBody") -> Iterator[tuple[str, str]]:
    entry = 1
    for level, encoder in enumerate(body.encoder):
        ours = f"body.encoder.{level}"
        names = [f"{ours}.blocks.{i}" for i in range(len(cast(nn.ModuleList, encoder.blocks)))] + [f"{ours}.down"]
        for i, name in enumerate(names):
            yield f"input_blocks.{entry + i}.0", name
        yield f"input_blocks.{entry + len(names)}.0.conv", f"{ours}.pyramid"
        entry += len(names) + 1
    yield from ((f"middle_block.{i}", f"body.middle.{i}") for i in range(len(body.middle)))
    entry = 0
    for level, decoder in enumerate(body.decoder):
        ours = f"body.decoder.{level}"
        names = [f"{ours}.blocks.{i}" for i in range(len(cast(nn.ModuleList, decoder.blocks)))]
        for name in [*names, names[-1]]:
            yield f"output_blocks.{entry}.0", name
            entry += 1
        yield f"output_blocks.{entry - 1}.1", f"{ours}.up"
    yield from ((f"out_res.{i}.0", f"body.refine.{i}") for i in range(len(body.refine)))


def published_config(shapes: Mapping[str, tuple[int, ...]]) -> UNetConfig:
    """Architecture of a published network, read off the names and shapes of its tensors.

    Raises:
        WeightsError: these are not the tensors of a (c)WDM network.
    """
    try:
        return _read_config(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(
            "these are not the weights of a WDM or cWDM network: the tensors that tell the architecture "
            f"(input_blocks, output_blocks, out) are missing or have other shapes ({error!r})"
        ) from error


def _read_config(shapes: Mapping[str, tuple[int, ...]]) -> UNetConfig:
    width, in_channels = shapes["input_blocks.0.0.weight"][:2]
    wavelet = any(name.startswith("out_res.") for name in shapes)
    block_widths = []  # of the residual blocks of the encoder, in order
    entry = 1
    while f"input_blocks.{entry}.0.in_layers.2.weight" in shapes:
        block_widths.append(shapes[f"input_blocks.{entry}.0.in_layers.2.weight"][0])
        entry += 1
        if f"input_blocks.{entry}.0.conv.weight" in shapes:
            entry += 1
    decoder = {int(name.split(".")[1]) for name in shapes if name.startswith("output_blocks.")}
    ups = sum(name.startswith("output_blocks.") and name.endswith(".1.in_layers.0.weight") for name in shapes)
    levels = ups if wavelet else ups + 1
    num_res_blocks = len(decoder) // levels - 1
    if len(block_widths) < levels * (num_res_blocks + 1) - (not wavelet):
        raise ValueError(f"{len(block_widths)} encoder blocks for {levels} levels")
    first_decoder_input = shapes["output_blocks.0.0.in_layers.2.weight"][1]
    deepest = block_widths[-1]
    skips = "wavelet" if wavelet else "concat" if first_decoder_input > deepest else "additive"
    per_level = block_widths[:: num_res_blocks + 1]
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes["out.2.weight"][0],
        model_channels=width,
        channel_mult=tuple(level_width // width for level_width in per_level),
        num_res_blocks=num_res_blocks,
        skips=cast(Any, skips),
    )
