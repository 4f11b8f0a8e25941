import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import TINY

from cwdm.checkpoint import Record
from cwdm.drop import drop_modalities
from cwdm.errors import SettingsError
from cwdm.untrained import write_untrained
from cwdm.workers import count_workers


@pytest.fixture(scope="module")
def cohort(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Cases and weights."""
    cases, weights = tmp_path_factory.mktemp("cases"), tmp_path_factory.mktemp("weights")
    drop_modalities(phantoms, cases, seed=1)
    write_untrained(weights, TINY, Record(sampler="ddim", steps=2))
    return cases, weights


def command(cohort: tuple[Path, Path], output: Path, *options: str) -> list[str]:
    cases, weights = cohort
    paths = [f"--data_path={cases}", f"--output_path={output}", f"--weights={weights}"]
    return [sys.executable, "-m", "cwdm", "infer", "--device=cpu", *paths, *options]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_workers_do_what_one_does(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(cohort, one), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    done = subprocess.run(command(cohort, two, "--devices=2"), capture_output=True, text=True, check=True)
    assert images(one) == images(two)
    assert "[0] " in done.stderr
    assert "[1] " in done.stderr


@pytest.mark.full
def test_a_share_is_shared_again(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    subprocess.run(command(cohort, tmp_path, "--devices=2", "--shard=0/2"), check=True)
    assert len(images(tmp_path)) == 2


def test_the_worst_exit_code_wins(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    done = subprocess.run(command(cohort, tmp_path, "--devices=2", "sampler.steps=0"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "sampler.steps" in done.stderr


def running(cohort: tuple[Path, Path], output: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A slow run of two workers, and these."""
    process = subprocess.Popen(
        command(cohort, output, "--devices=2", "sampler.steps=25"), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = psutil.Process(process.pid).children()
        if len(workers) == 2:
            return process, workers
        time.sleep(0.05)
    raise AssertionError("the workers did not start")


@pytest.mark.full
def test_a_killed_worker_is_started_again(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    process, workers = running(cohort, tmp_path)
    workers[0].kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "killed by signal 9; starting it again" in said
    assert len(images(tmp_path)) == 3


@pytest.mark.full
def test_a_stopped_run_stops_its_workers(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    process, workers = running(cohort, tmp_path)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("devices", ["0", "-1", "two", "1.5", "²"])
def test_what_is_no_number_of_workers_is_refused(devices: str) -> None:
    with pytest.raises(SettingsError, match="--devices"):
        count_workers(devices, "cpu")


def test_all_without_a_gpu_is_one() -> None:
    assert count_workers("all", "cpu") == 1
