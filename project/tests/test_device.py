import logging

import pytest
import torch

from cwdm import Synthesizer
from cwdm.device import choose_device
from cwdm.errors import SettingsError


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:١", "CPU", "mps", "", "auto:0"])
def test_unknown_names_are_refused(name: str, weights_folder) -> None:
    with pytest.raises(SettingsError, match="expected auto, cpu, cuda, or cuda:N"):
        Synthesizer(weights_folder, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(name: str, weights_folder) -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingsError, match="PyTorch finds none"):
        Synthesizer(weights_folder, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch without CUDA, made to see a GPU, fails as one does that was built for others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(SettingsError, match=r"cannot use it \(Torch not compiled"):
            choose_device(name)
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto") == torch.device("cpu")
    assert "cannot use it" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_named_by_its_index() -> None:
    for name in ("auto", "cuda", f"cuda:{torch.cuda.current_device()}"):
        assert choose_device(name) == torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(SettingsError, match="cannot use it"):
        choose_device("cuda:99")
