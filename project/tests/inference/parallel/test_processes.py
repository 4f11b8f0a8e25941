import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
from support import TINY

from cwdm.checkpoint import Record
from cwdm.errors import SettingsError
from cwdm.inference.parallel.processes import count_workers
from cwdm.prepare.drop import drop_modalities
from cwdm.weights.untrained import write_untrained


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


def words(cohort: tuple[Path, Path], output: Path, *options: str) -> list[str]:
    """The same for `forked.start`."""
    return command(cohort, output, *options)[3:]


def infer(cohort: tuple[Path, Path], output: Path, *options: str, code: int = 0) -> str:
    """What a run that ends with this code says."""
    process = forked.start(*words(cohort, output, *options))
    said = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def test_a_run_in_one_process_loads_nothing_of_workers(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    code = "import sys\nfrom cwdm.cli.app import app\ntry:\n    app()\nfinally:\n    print(*sys.modules)"
    start = [sys.executable, "-c", code, *words(cohort, tmp_path)]
    loaded = subprocess.run(start, capture_output=True, text=True, check=True).stdout.split()
    assert "cwdm.inference.cohort" in loaded
    workers = ("cwdm.inference.parallel", "ray", "cwdm.training", "cwdm.inference.translate", "cwdm.inference.generate")
    assert not [name for name in loaded if name.startswith(workers)]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_workers_do_what_one_does(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(cohort, one), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = infer(cohort, two, "--devices=2")
    assert images(one) == images(two)
    assert "[0] " in said
    assert "[1] " in said


@pytest.mark.full
def test_a_share_is_shared_again(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    for shard in ("0/2", "1/2"):
        infer(cohort, tmp_path / shard[0], "--devices=2", f"--shard={shard}")
    assert not images(tmp_path / "0").keys() & images(tmp_path / "1").keys()
    assert len(images(tmp_path / "0")) + len(images(tmp_path / "1")) == 3


def test_unusable_settings_end_the_run(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    assert "sampler.steps" in infer(cohort, tmp_path, "--devices=2", "sampler.steps=0", code=2)


def test_a_run_of_workers_is_recorded_once_and_skips_what_is_there(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--devices=2", f"--report_path={tmp_path / 'report'}")
    infer(cohort, tmp_path / "out", *options)
    (record,) = (tmp_path / "report").glob("run-*.json")
    assert [case["status"] for case in json.loads(record.read_text())["cases"]] == ["written"] * 3
    assert (tmp_path / "report" / "report.html").is_file()
    assert infer(cohort, tmp_path / "out", "--devices=1").count("is there already") == 3


def test_nothing_is_imported_from_the_folder_that_a_run_starts_in(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "cwdm").mkdir(parents=True)
    for module in ("cwdm/__init__", "typer", "pickle", "multiprocessing", "torch"):
        (here / f"{module}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    # As the installed command: its own folder stands first, not the current one.
    start = [sys.executable, "-P", *command(cohort, tmp_path / "out", "--devices=2")[1:]]
    done = subprocess.run(start, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()
    assert len(images(tmp_path / "out")) == 3


def running(
    cohort: tuple[Path, Path], output: Path, steps: int = 400, heard: tuple[int, ...] = ()
) -> tuple[forked.Forked, list[psutil.Process]]:
    """A slow run of two workers in the middle of cases, and these."""
    process = forked.start(*words(cohort, output, "--devices=2", f"sampler.steps={steps}"), heard=heard)
    begun = {line[:4] for line in itertools.islice(process.stderr, 3)}  # then how many cases, and each worker's summary
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2, begun
    time.sleep(0.5)
    return process, workers


def end_of(workers: list[psutil.Process]) -> list[psutil.Process]:
    """The workers that are still there after a while."""
    return psutil.wait_procs(workers, timeout=30)[1]


@pytest.mark.full
def test_a_killed_worker_is_replaced(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    process, workers = running(cohort, tmp_path, steps=20)
    workers[0].kill()
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "was lost (killed by signal 9); back to the others with BraTS-PHANTOM" in said
    assert len(images(tmp_path)) == 3


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, marks=pytest.mark.full),
        signal.SIGKILL,
    ],
)
def test_workers_end_with_their_parent(how: signal.Signals, cohort: tuple[Path, Path], tmp_path: Path) -> None:
    process, workers = running(cohort, tmp_path, heard=() if how == signal.SIGKILL else (how,))
    process.send_signal(how)
    said = process.communicate(timeout=60)
    assert process.returncode == (128 + how if how in (signal.SIGTERM, signal.SIGINT) else -how), said
    assert not end_of(workers)
    assert images(tmp_path) == {}


@pytest.mark.parametrize("devices", ["0", "-1", "two", "1.5", "²"])
def test_what_is_no_number_of_workers_is_refused(devices: str) -> None:
    with pytest.raises(SettingsError, match="--devices"):
        count_workers(devices, "cpu")


def test_all_without_a_gpu_is_one() -> None:
    assert count_workers("all", "cpu") == 1
