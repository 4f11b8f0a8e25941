"""MedicalNet's ResNet-50 (Chen et al., arXiv:1904.00625), whose features FID is computed from, and its weights."""

from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cwdm.arrays import Volume
from cwdm.device import choose_device
from cwdm.errors import WeightsError
from cwdm.precision import exact_float32

FEATURES = 2048


class MedicalNet(nn.Module):
    """ResNet-50 in 3D whose last two stages dilate instead of striding: (B, 1, X, Y, Z) -> (B, 2048).

    Module names are those of the published weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        self.layer1 = self._stage(64, 64, blocks=3)
        self.layer2 = self._stage(256, 128, blocks=4, stride=2)
        self.layer3 = self._stage(512, 256, blocks=6, dilation=2)
        self.layer4 = self._stage(1024, 512, blocks=3, dilation=4)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048) of volumes (B, 1, X, Y, Z) in [0, 1]."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu_())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3, 4))

    @staticmethod
    def _stage(channels: int, width: int, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        first = _Bottleneck(channels, width, stride, dilation)
        return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)))


def load_medicalnet(path: Path) -> MedicalNet:
    """MedicalNet's ResNet-50 from resnet_50_23dataset.pth, read as tensors only; on the GPU if there is one.

    Raises:
        WeightsError: the file cannot be read, asks to run code, or holds other tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        raise WeightsError(f"{path}: cannot be read as weights ({' '.join(str(error).split())[:200]})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a dictionary of tensors, as in resnet_50_23dataset.pth of MedicalNet")
    network = MedicalNet()
    try:
        wrong = network.load_state_dict(
            {name.removeprefix("module."): value for name, value in state.items()}, strict=False
        )
    except RuntimeError as error:
        raise WeightsError(f"{path}: not MedicalNet's ResNet-50 ({' '.join(str(error).split())[:200]})") from error
    # Counters of batches, which play no part here, are missing from files that old versions of PyTorch wrote.
    missing = [name for name in wrong.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or wrong.unexpected_keys:
        raise WeightsError(
            f"{path}: not MedicalNet's ResNet-50; {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(wrong.unexpected_keys)} left over ({', '.join(wrong.unexpected_keys[:3])})"
        )
    return network.to(choose_device()).eval()


def features_of(network: nn.Module, volume: Volume) -> npt.NDArray[np.float32]:
    """Features (2048,) of a volume (X, Y, Z) in [0, 1]."""
    device = next(network.parameters()).device
    x = torch.from_numpy(np.ascontiguousarray(volume))[None, None].to(device)
    with torch.inference_mode(), exact_float32():
        features: npt.NDArray[np.float32] = network(x)[0].cpu().numpy()
    return features


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv3d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if self.downsample else x
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        return (self.bn3(self.conv3(x)) + shortcut).relu_()
