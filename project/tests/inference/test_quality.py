"""The check of outputs against planted faults, on small volumes of no equal axes."""

import numpy as np
import pytest
from scipy import ndimage

from cwdm.images.intensity import brain_mask, normalise
from cwdm.inference.outcome import Quality
from cwdm.inference.quality import CHECKS, assess
from cwdm.phantoms import make_phantom

Volume = np.ndarray


@pytest.fixture(scope="module")
def head() -> tuple[Volume, dict[str, Volume], Volume]:
    """A true t1n, the other contrasts in [0, 1], and the mask; 2 mm, 90×104×78 voxels."""
    phantom = make_phantom(7, (90, 104, 78), 2.0)
    units = {name: normalise(volume.astype(np.float32))[0] for name, volume in phantom.volumes.items()}
    mask = brain_mask(phantom.volumes.values())
    return units.pop("t1n"), units, mask


def check(head: tuple[Volume, dict[str, Volume], Volume], output: Volume, std: Volume | None = None) -> Quality:
    _, conditions, mask = head
    return assess(np.where(mask, output, 0).astype(np.float32), conditions, mask, "t1n", std)


def random(shape: tuple[int, ...]) -> Volume:
    return np.random.default_rng(0).random(shape, np.float32)


def test_a_true_image_passes_and_its_figures_are_told(head) -> None:
    quality = check(head, head[0], 0.01 * random(head[0].shape))
    assert quality.verdict == "ok", quality.reasons
    assert quality.reasons == ()
    assert quality.figures["empty"] == pytest.approx(0, abs=1e-3)
    assert 0.3 < quality.figures["edges"] < 1
    assert quality.figures["spread"] == pytest.approx(0.005, rel=0.05)


def test_figures_are_those_of_earlier_versions(head) -> None:
    y = np.arange(head[0].shape[1])[:, None]
    std = np.broadcast_to(np.where(y < 50, np.float32(0.2), np.float32(0.02)), head[0].shape)
    quality = check(head, np.roll(head[0], 6, axis=1), std)
    assert quality.reasons == (
        "11% of the brain is empty in the output",
        "the output ends 7 slices before the brain at the front",
        "the anatomy lies beside that of the conditions, by voxels: about 6 to the back",
        "in 35% of the brain the samples disagree as much as tissues differ",
    )
    expected = {"empty": 0.113, "empty_slices": 7, "median": 0.4683, "range": 0.8762, "p99": 0.9624}
    expected |= {"saturated": 0.003402, "roughness": 0.1535, "spikes": 0.000288, "correlation_t1c": 0.1668}
    expected |= {"correlation_t2w": -0.3297, "correlation_t2f": 0.01265, "expected_sign": 0.1697, "edges": 0.1109}
    expected |= {"shift": 6, "spread": 0.02, "spread_share": 0.3535, "edge_share": 0}
    assert list(quality.figures) == list(expected)
    assert quality.figures == pytest.approx(expected, rel=1e-3)


def test_every_check_that_judges_says_why() -> None:
    for row in CHECKS:
        assert bool(row.message) == (row.limits is not None), row
    assert {row.unless for row in CHECKS} <= {"", *(row.metric for row in CHECKS)}


def half(truth: Volume) -> Volume:
    return np.where(np.arange(truth.shape[0])[:, None, None] < truth.shape[0] // 2, truth, 0)


def short(truth: Volume) -> Volume:
    return np.where(np.arange(truth.shape[2]) < 58, truth, 0)


def salted(truth: Volume) -> Volume:
    salt = np.random.default_rng(1).random(truth.shape)
    return np.where(salt < 0.002, 1, np.where(salt > 0.998, 0, truth))


@pytest.mark.parametrize(
    ("fault", "verdict", "reason"),
    [
        (half, "reject", "of the brain is empty"),
        (short, "look", "slices before the brain at the top"),
        (lambda truth: 0 * truth + 0.5, "reject", "nearly constant"),
        (lambda truth: random(truth.shape), "reject", "noisy"),
        (salted, "look", "stand out from all their neighbours"),
        (lambda truth: np.roll(truth, 6, axis=1), "look", "about 6 to the back"),
        (lambda truth: 1 - truth, "look", "bright and dark look exchanged"),
        (lambda truth: 0.4 * truth, "look", "far too dark"),
        (lambda truth: 3 * truth, "reject", "at the upper end of the range"),
        (lambda truth: ndimage.gaussian_filter(truth[::-1, ::-1, ::-1], 6), "look", "hardly follow"),
    ],
)
def test_a_planted_fault_is_named(head, fault, verdict: str, reason: str) -> None:
    quality = check(head, fault(head[0]))
    assert quality.verdict == verdict, quality
    assert any(reason in told for told in quality.reasons), quality.reasons


def test_a_copied_condition_is_named(head) -> None:
    quality = check(head, head[1]["t1c"])
    assert quality.verdict == "look"
    assert "practically the same image as t1c" in quality.reasons


@pytest.mark.parametrize(("size", "verdict"), [(0.02, "ok"), (0.08, "look"), (0.2, "reject")])
def test_samples_that_disagree(head, size: float, verdict: str) -> None:
    assert check(head, head[0], np.full(head[0].shape, size, np.float32)).verdict == verdict


def test_samples_that_disagree_about_a_tenth_of_the_brain(head) -> None:
    spread = (random(head[0].shape) < 0.1) * np.float32(0.2)
    quality = check(head, head[0], spread)
    assert quality.verdict == "look"
    assert any("samples disagree as much as tissues differ" in reason for reason in quality.reasons)


def test_the_gravest_reason_comes_first(head) -> None:
    quality = check(head, 3 * short(head[0]))
    assert quality.verdict == "reject"
    assert len(quality.reasons) > 1
    assert "upper end" in quality.reasons[0]


def test_conditions_that_are_cut_off_or_short_or_squeezed_are_named(head) -> None:
    truth, conditions, mask = head
    top = np.flatnonzero(mask.any(axis=(0, 1)))[-1]
    cut = np.s_[:, :, : top - 12]
    quality = assess(truth[cut], {name: volume[cut] for name, volume in conditions.items()}, mask[cut], "t1n")
    assert (quality.verdict, quality.reasons) == (
        "look",
        ("the brain is cut off at the top: the field of view is truncated",),
    )
    quality = assess(truth, {**conditions, "t2w": short(conditions["t2w"])}, mask, "t1n")
    assert any(reason.startswith("t2w, a condition, ends") and "at the top" in reason for reason in quality.reasons)
    quality = assess(truth, {**conditions, "t1c": 0.2 * conditions["t1c"]}, mask, "t1n")
    assert any(reason.startswith("t1c, a condition: a few voxels") for reason in quality.reasons)


def test_what_cannot_be_checked_is_rejected(head) -> None:
    truth, conditions, mask = head
    broken = truth.copy()
    broken[3, 4, 5] = np.nan
    broken[3, 4, 6] = np.inf
    assert assess(broken, conditions, mask, "t1n") == Quality("reject", ("2 voxels are not finite numbers",), {})
    empty = assess(truth, conditions, np.zeros_like(mask), "t1n")
    assert (empty.verdict, empty.figures) == ("reject", {})
    assert "no brain" in empty.reasons[0]
    with pytest.raises(ValueError, match="one shape"):
        assess(truth[1:], conditions, mask, "t1n")
    with pytest.raises(ValueError, match="one shape"):
        assess(truth, {}, mask, "t1n")


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (5, 4, 7)])
def test_tiny_volumes_have_an_answer(shape: tuple[int, int, int]) -> None:
    volume = random(shape)
    quality = assess(volume, {"t1c": volume[::-1]}, np.ones(shape, bool), "t1n")
    assert all(np.isfinite(value) for value in quality.figures.values())


def predicted(head, std: Volume) -> Quality:
    truth, conditions, mask = head
    return assess(np.where(mask, truth, 0).astype(np.float32), conditions, mask, "t1n", std.astype(np.float32), True)


def test_a_predicted_std_has_figures_of_its_own(head) -> None:
    quality = predicted(head, 0.04 + 0.04 * random(head[0].shape))
    assert quality.verdict == "ok", quality.reasons
    assert not {"spread", "spread_share"} & set(quality.figures)
    assert quality.figures["std"] == pytest.approx(0.06, rel=0.02)
    assert quality.figures["std_mean"] == pytest.approx(0.06, rel=0.02)
    assert quality.figures["std_share"] == 0
    assert 1 <= quality.figures["std_region"] < 1.2


@pytest.mark.parametrize(("size", "verdict"), [(0.08, "ok"), (0.12, "look"), (0.25, "reject")])
def test_errors_that_are_predicted_all_over_the_brain(head, size: float, verdict: str) -> None:
    quality = predicted(head, np.full(head[0].shape, size))
    assert quality.verdict == verdict
    assert verdict == "ok" or "half of the brain is predicted to be off" in quality.reasons[0]


def test_a_tumour_that_the_network_is_uncertain_of_is_named() -> None:
    phantom = make_phantom(7, (90, 104, 78), 2.0)
    units = {name: normalise(volume.astype(np.float32))[0] for name, volume in phantom.volumes.items()}
    mask, tumour = brain_mask(phantom.volumes.values()), phantom.seg > 0
    head = units.pop("t1n"), units, mask
    rim = mask & ~ndimage.binary_erosion(mask, iterations=2)
    # The edge of the brain, thin as it is, is no region, and neither is what is uncertain of next to nothing.
    assert predicted(head, np.where(rim, 0.15, 0.05)).verdict == "ok"
    assert predicted(head, np.where(tumour, 0.06, 0.01)).verdict == "ok"
    quality = predicted(head, np.where(tumour, 0.25, 0.05))
    assert quality.verdict == "look"
    assert quality.figures["std_region"] > 3
    place = np.argwhere(tumour).mean(axis=0) / np.argwhere(mask).mean(axis=0)
    side = "left" if place[0] > 1 else "right"
    assert "in a region" in quality.reasons[0]
    assert side in quality.reasons[0]
