"""How many bytes does a training step move outside the convolutions, and how many does it keep?

    python traffic.py [--size 112 112 80] [--by-operation]

A count, which takes no GPU: the published network runs on PyTorch's meta device, whose tensors have no numbers, with
the shapes, types and layouts that there would be on a GPU. Every operation counts with the bytes of its inputs and
outputs, once each, as if the caches kept nothing; the Triton kernels with those of every pass. Views count nothing, and
convolutions and matrix products, which are bound by arithmetic, are left out. Kept is what autograd saves from the
forward pass for the backward one, every piece of memory once, the parameters left out.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cwdm.kernels import ops, triton_kernels
from cwdm.unet import UNet, UNetConfig

CONFIG = UNetConfig(in_channels=32)
LAYOUT = torch.channels_last_3d
PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm")
KERNELS = (
    "measure",
    "normalise",
    "accumulate",
    "measure_gradients",
    "normalise_backward",
    "combine",
    "combine_gradients",
)


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, by operation, and those of convolutions and products apart."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "convolution" in func.overloadpacket.__name__:
            result = tree_map(lambda x: as_cudnn(x, args[0]), result)
        name = func.overloadpacket.__name__
        inputs, outputs = tensors(args), tensors(result)
        fresh = {memory(x) for x in outputs} - {memory(x) for x in inputs}
        if (fresh or func._schema.is_mutable) and "empty" not in name and not any(p in name for p in PRODUCTS):
            # What is expanded lies in memory once, and what is written in place is read and written.
            self.moved[name] += sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs))
        return result


class Autocast(TorchFunctionMode):
    """What autocast to bfloat16 does on a GPU to the operations of this network; the meta device has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("conv3d", "linear", "group_norm"):
            dtype = torch.float32 if name == "group_norm" else torch.bfloat16
            args, kwargs = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, (args, kwargs))
        return func(*args, **(kwargs or {}))


def as_cudnn(x: Any, like: Tensor) -> Any:
    """A convolution's result in the layout of its input."""
    last = isinstance(x, Tensor) and x.ndim == 5 and like.is_contiguous(memory_format=LAYOUT)
    return x.contiguous(memory_format=LAYOUT) if last else x


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def memory(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def bytes_of(x: Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.itemsize


class CountedKernel:
    """Stands for a Triton kernel: launched, it counts what the kernel would read and write.

    Of the result or the gradient of two joined tensors, a launch for one of them touches its own columns.
    """

    def __init__(self, name: str, traffic: Traffic) -> None:
        self.name, self.traffic = name, traffic

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, x: Tensor, *others: Tensor | None, **_: object) -> None:
        touched = [min(other.numel(), x.numel()) * other.itemsize for other in others if other is not None]
        written_over = x.nbytes if self.name == "accumulate" else 0
        self.traffic.moved[f"kernel {self.name}"] += x.nbytes + sum(touched) + written_over


@contextmanager
def counted_kernels(traffic: Traffic, wanted: bool) -> Iterator[None]:
    """Kernels that count instead of computing; not `wanted`: every block takes PyTorch's modules."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(ops, "triton_kernels", lambda _: triton_kernels if wanted else None))
        for name in KERNELS:
            patches.enter_context(patch.object(triton_kernels, name, CountedKernel(name, traffic)))
        yield


def count(size: list[int], bfloat16: bool, kernels: bool) -> tuple[Counter[str], int]:
    """Bytes moved by each operation of one step forward and backward, and bytes kept in between."""
    traffic = Traffic()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[memory(x)] = x.untyped_storage().nbytes()
        return x

    with counted_kernels(traffic, kernels), torch.device("meta"):
        model = UNet(CONFIG).to(memory_format=LAYOUT)  # type: ignore[call-overload]
        x, t = torch.empty(1, CONFIG.in_channels, *size), torch.zeros(1, dtype=torch.long)
        own = {memory(parameter) for parameter in model.parameters()}
        with traffic:
            saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with saved, Autocast() if bfloat16 else nullcontext():
                output = model(x, t)
            output.float().square().mean().backward()
    return traffic.moved, sum(size for place, size in kept.items() if place not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=[112, 112, 80], help="of the coefficients")
    parser.add_argument("--by-operation", action="store_true", help="the largest of them too")
    arguments = parser.parse_args()
    table = Table("training step", "GB moved outside convolutions", "GiB kept for the backward pass")
    for bfloat16 in (True, False):
        for kernels in (False, True):
            moved, kept = count(arguments.size, bfloat16, kernels)
            name = f"{'bfloat16' if bfloat16 else 'float32'}, {'Triton kernels' if kernels else 'PyTorch modules'}"
            table.add_row(name, f"{sum(moved.values()) / 1e9:.1f}", f"{kept / 2**30:.1f}")
            for operation, size in moved.most_common(12) if arguments.by_operation else ():
                table.add_row(f"  {operation}", f"{size / 1e9:.1f}", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
