import numpy as np
import ptwt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdm.wavelet import dwt, haar, idwt, inverse_haar

KEYS = ("aad", "ada", "add", "daa", "dad", "dda", "ddd")
even = st.integers(1, 6).map(lambda n: 2 * n)
volumes = st.tuples(st.integers(1, 2), st.integers(1, 3), even, even, even, st.integers(0, 2**31 - 1)).map(
    lambda s: torch.randn(s[:5], generator=torch.Generator().manual_seed(s[5]))
)


@given(volumes)
def test_haar_is_ptwts(x: torch.Tensor) -> None:
    lll, high = ptwt.wavedec3(x.flatten(0, 1), "haar", mode="zero", level=1)
    expected = torch.stack([lll / 3, *(high[key] for key in KEYS)], dim=1).reshape(x.shape[0], -1, *lll.shape[1:])
    torch.testing.assert_close(dwt(x), expected, atol=2e-6, rtol=0)


@given(volumes)
def test_haar_round_trip_and_energy(x: torch.Tensor) -> None:
    torch.testing.assert_close(idwt(dwt(x)), x, atol=2e-6, rtol=0)
    torch.testing.assert_close(dwt(x, lll_divisor=1.0).square().sum(), x.square().sum())
    torch.testing.assert_close(inverse_haar(haar(x)), x, atol=2e-6, rtol=0)


@settings(max_examples=10)
@given(st.sampled_from(["db2", "db4", "sym3"]), st.integers(0, 1000))
def test_other_wavelets_round_trip_and_keep_energy(wavelet: str, seed: int) -> None:
    x = torch.randn(2, 2, 16, 12, 20, generator=torch.Generator().manual_seed(seed))
    coefficients = dwt(x, wavelet)
    assert coefficients.shape == (2, 16, 8, 6, 10)
    torch.testing.assert_close(idwt(coefficients, wavelet), x, atol=1e-5, rtol=0)
    energy = dwt(x, wavelet, lll_divisor=1.0).square().sum()
    torch.testing.assert_close(energy, x.square().sum(), rtol=1e-5, atol=0)


def test_other_wavelets_agree_with_the_filter_bank_away_from_the_border() -> None:
    x = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    # Same filters; ptwt's two transforms differ at the border, in which sample is first, and in where bands begin.
    lll, high = ptwt.wavedec3(x.roll((1, 1, 1), (2, 3, 4))[0], "db2", mode="zero", level=1)
    expected = torch.stack([lll, *(high[key] for key in KEYS)], dim=1)[:, :, 6:12, 6:12, 6:12]
    got = dwt(x, "db2", lll_divisor=1.0)[:, :, 5:11, 5:11, 5:11]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_bands_are_named_by_axis() -> None:
    ramp = torch.zeros(1, 1, 4, 4, 4)
    ramp[:, :, 1::2] = 1.0  # alternates along the first axis: high there, low elsewhere -> HLL, index 4
    energy = dwt(ramp)[0].square().sum(dim=(1, 2, 3)).numpy()
    assert np.flatnonzero(energy > 1e-9).tolist() == [0, 4]


def test_constant_volume_by_hand() -> None:
    coefficients = dwt(torch.ones(1, 1, 2, 2, 2))
    np.testing.assert_allclose(coefficients.flatten(), [8**0.5 / 3, 0, 0, 0, 0, 0, 0, 0], atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 1, 3, 4, 4), (1, 4, 4, 4)])
def test_odd_sizes_and_missing_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="even size"):
        dwt(torch.zeros(shape))


def test_gradients_flow() -> None:
    x = torch.randn(1, 1, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: idwt(dwt(v) ** 2), (x,))


def test_another_dtype_of_the_same_shape_is_transformed_in_its_own() -> None:
    x = torch.randn(1, 1, 8, 10, 12)
    single = dwt(x, "db2")
    double = dwt(x.double(), "db2")
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float())
    torch.testing.assert_close(idwt(double, "db2"), x.double())
