import numpy as np
import pytest
from numpy.typing import NDArray

from cwdm.phantoms.physics import (
    GD_R1,
    TISSUES,
    Timing,
    inversion_recovery,
    nulling_time,
    shortened_t1,
    spin_echo,
)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def test_spin_echo_follows_the_closed_formula() -> None:
    t1, t2 = floats(800, 1400), floats(70, 90)
    expected = floats(*(0.7 * (1 - np.exp(-500 / a)) * np.exp(-12 / b) for a, b in ((800, 70), (1400, 90))))
    np.testing.assert_allclose(spin_echo(np.float32(0.7), t1, t2, tr=500, te=12), expected, rtol=1e-6)


def test_inversion_recovery_starts_inverted_and_recovers() -> None:
    t1, t2 = floats(900), floats(1e9)
    tr = 1e6  # fully relaxed
    assert inversion_recovery(np.float32(1), t1, t2, tr, 0, ti=0)[0] == pytest.approx(-1)
    assert inversion_recovery(np.float32(1), t1, t2, tr, 0, ti=900 * np.log(2))[0] == pytest.approx(0, abs=1e-6)
    assert inversion_recovery(np.float32(1), t1, t2, tr, 0, ti=1e5)[0] == pytest.approx(1)


@pytest.mark.parametrize("tr", [5000.0, 9000.0])
def test_nulling_time_nulls_the_fluid(tr: float) -> None:
    t1, t2 = floats(4200), floats(1500)
    timing = Timing(tr, 110, nulling_time(4200, tr))
    assert timing.signal(np.float32(1), t1, t2)[0] == pytest.approx(0, abs=1e-6)
    assert timing.signal(np.float32(1), floats(1050), t2)[0] > 0.3


def test_gadolinium_adds_to_the_relaxation_rate() -> None:
    t1 = floats(1500)
    rate = 1000 / shortened_t1(t1, 0.5)  # 1/s
    np.testing.assert_allclose(rate, 1000 / 1500 + GD_R1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(shortened_t1(t1, 0.0), t1)


def test_tissue_table_is_ordered_as_measured_at_3_t() -> None:
    white, grey, csf = (TISSUES[name] for name in ("white", "grey", "csf"))
    assert white.t1 < grey.t1 < csf.t1
    assert white.t2 < grey.t2 < csf.t2
    assert white.pd < grey.pd < csf.pd
