"""What numbers a network is computed in: float32 that is float32, or bfloat16."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

import torch

_SWITCHES = (
    ("generic", "all"),
    ("cuda", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "all"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)
"""PyTorch's `fp32_precision` by backend and operation; one that says "none" does what the ones before it say."""


_lock = Lock()
_before: list[str] = []
_users = 0


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products with all of their 24 bits, on a GPU and on a CPU: no TF32, no bfloat16 in their place.

    Whatever was switched on before, by PyTorch's new names or its old ones (`allow_tf32`,
    `set_float32_matmul_precision`), is as it was afterwards. The switches are the process's: the last of several
    threads that are inside puts them back.
    """
    global _users
    with _lock:
        if _users == 0:
            _switch_off()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for switch, value in zip(_SWITCHES, _before, strict=True):
                    torch._C._set_fp32_precision_setter(*switch, value)


def _switch_off() -> None:
    # Not by their public names: of mkldnn's the setter writes to another switch than the getter reads, and the old
    # names refuse to be read once a new one was set. The kernels of PyTorch ask these.
    _before.clear()
    for switch in _SWITCHES:  # the general ones first: a switch shows its own value once they say nothing
        _before.append(torch._C._get_fp32_precision_getter(*switch))
        torch._C._set_fp32_precision_setter(*switch, "none")
    for switch in _SWITCHES:
        torch._C._set_fp32_precision_setter(*switch, "ieee")


def choose_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where asked for or (auto) where a GPU multiplies it natively.

    On a CPU auto is float32, whatever its instructions: the Winograd convolutions are float32's alone.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def warn_of_precision(dtype: torch.dtype, device: torch.device, log: Callable[[str], None]) -> None:
    """Say what to do about numbers that the device computes slowly."""
    if dtype == torch.bfloat16 and not has_bf16(device):
        name = "the GPU" if device.type == "cuda" else "the processor"
        log(
            f"warning: {name} does not multiply bfloat16, and emulating it takes many times as long as float32; "
            "stop this run and set precision=fp32"
        )


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively: Ampere and later, AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
