import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import samples
from torch.utils.data import default_collate

from cwdm.errors import CaseError, SettingsError
from cwdm.training import TrainingError
from cwdm.training.loader import batch_numbers, check_shared_memory, read_batches
from cwdm.training.settings import DataSettings

TESTS = Path(__file__).parents[1]


def test_samples_are_counted_and_not_listed() -> None:
    numbers = batch_numbers(range(3, 10**12), batch_size=8, first=4, share=2, parts=1)
    assert [next(numbers) for _ in range(3)] == [[28, 29], [36, 37], [44, 45]]
    numbers = batch_numbers(range(3, 10**12), batch_size=8, first=4, share=4, parts=2)
    assert [next(numbers) for _ in range(3)] == [[28, 29], [30, 31], [36, 37]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_any_number_of_processes(phantoms: Path, tmp_path: Path, workers: int) -> None:
    source = samples(
        DataSettings(path=phantoms, target="t2w", crop=[8, 8, 8], window="brain", workers=workers), tmp_path
    )
    found = list(read_batches(source, batch_numbers(range(2), 4, 0, 4, 2)))
    expected = [default_collate([source[n], source[n + 1]]) for n in (0, 2, 4, 6)]
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert all(batch[name].equal(other[name]) for name in other)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_is_lost_on_the_way_is_named(phantoms: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(phantoms, tmp_path / "data")
    data = DataSettings(path=tmp_path / "data", target="t2w", window="brain", workers=workers)
    source = samples(data, tmp_path / "cache")
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CaseError, match=r"^BraTS-PHANTOM.*cannot be read") as caught:
        next(read_batches(source, [[0]]))
    assert "Traceback" not in str(caught.value)


def test_a_reading_process_that_dies_is_told_with_what_to_do(phantoms: Path, tmp_path: Path) -> None:
    source = samples(DataSettings(path=phantoms, target="t2w", window="brain", workers=1), tmp_path)
    handler = signal.getsignal(signal.SIGCHLD)
    batches = read_batches(source, batch_numbers(range(10**6), 1, 0, 1, 1))
    next(batches)
    # Whatever torch does when a child dies would happen in the middle of a step.
    assert signal.getsignal(signal.SIGCHLD) == handler
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(TrainingError, match=r"stopped by SIGKILL.*data.workers=0.*--shm-size"):
        list(batches)


def test_readers_do_not_keep_a_program_from_its_end(phantoms: Path, tmp_path: Path) -> None:
    """Whatever still refers to the batches, as an error's traceback may."""
    program = f"""
from pathlib import Path
from support import samples
from cwdm.training.loader import read_batches
from cwdm.training.settings import DataSettings
data = DataSettings(path=Path({str(phantoms)!r}), target="t2w", window="brain", workers=2)
batches = read_batches(samples(data, Path({str(tmp_path)!r})), ([n] for n in range(10**6)))
next(batches)
raise SystemExit(5)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=TESTS, timeout=60, check=False)
    assert result.returncode == 5


def test_more_readers_than_cores_are_no_reason_to_warn(
    phantoms: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    workers = len(os.sched_getaffinity(0)) + 1
    data = DataSettings(path=phantoms, target="t2w", window="brain", workers=workers)
    assert len(list(read_batches(samples(data, tmp_path), iter([[0]])))) == 1
    assert not [str(warning.message) for warning in recwarn]


def test_shared_memory_is_looked_at_before_the_first_step(phantoms: Path, tmp_path: Path) -> None:
    data = DataSettings(path=phantoms, target="t2w", window="brain", workers=64)
    source = samples(data, tmp_path)
    check_shared_memory(source, 1, 1)
    large = samples(data, tmp_path, optimiser={"batch_size": 8 * 10**9})
    with pytest.raises(SettingsError, match=r"--shm-size=\d+m or more, or give (data.workers=\d+, or )?data.workers=0"):
        check_shared_memory(large, 8, 8)
    none = samples(data.model_copy(update={"workers": 0}), tmp_path, optimiser={"batch_size": 8 * 10**9})
    check_shared_memory(none, 8, 8)
