"""What the benchmarks count."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return import_module(name)

    return load


def test_a_training_step_moves_a_third_with_the_kernels(benchmark: Any) -> None:
    traffic = benchmark("traffic")
    plain, kept_plain = traffic.count([112, 112, 80], bfloat16=True, kernels=False)
    fused, kept_fused = traffic.count([112, 112, 80], bfloat16=True, kernels=True)
    assert sum(fused.values()) < 0.4 * sum(plain.values())
    assert kept_fused < 0.45 * kept_plain


def test_traffic_of_one_normalisation_is_eight_passes(benchmark: Any) -> None:
    """Two reads and a write on the way forward, twice two reads and a write on the way back."""
    import torch
    from torch import nn

    traffic = benchmark("traffic")
    counter = traffic.Traffic()
    with traffic.counted_kernels(counter, True), torch.device("meta"):
        x = torch.empty(1, 64, 40, 48, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
        norm = nn.GroupNorm(32, 64)
        result = traffic.triton_kernels.norm_silu((x.requires_grad_(),), norm)
        result.backward(result.detach())
    assert sum(counter.moved.values()) == pytest.approx(8 * x.nbytes, rel=0.04)
