import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support import TINY

from cwdm.checkpoint import Record
from cwdm.errors import CwdmError, OutputError, WeightsError
from cwdm.images.cases import find_cases
from cwdm.inference.cohort import Work, synthesise_cohort
from cwdm.inference.synthesizer import Synthesizer
from cwdm.prepare.drop import drop_modalities
from cwdm.progress import CohortProgress
from cwdm.settings import load_settings
from cwdm.weights.untrained import write_untrained

pytest.importorskip("ray", reason="needs the extra 'ray'")

from cwdm.inference.parallel.ray_workers import cores_each, synthesise_on_ray

pytestmark = pytest.mark.full  # a cluster takes its time to start


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    weights = tmp_path_factory.mktemp("weights")
    write_untrained(weights, TINY, Record(sampler="ddim", steps=2))
    return Work(weights, load_settings(None, []), "cpu", tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def cases(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    drop_modalities(phantoms, folder, seed=1)
    (bad := folder / "BraTS-BAD").mkdir()
    (bad / "BraTS-BAD-t1n.nii.gz").write_bytes(b"no image")
    return folder


def test_a_cluster_with_a_worker_killed_loses_no_case_and_does_none_twice(
    work: Work, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    folders = find_cases(cases)
    slow = load_settings(None, ["sampler.steps=20"])
    output = tmp_path / "ray"
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it may be gone already
                    if "_Worker.run" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        break
            time.sleep(0.05)

    thread = threading.Thread(target=kill_one)
    thread.start()
    here = Work(work.weights, slow, "cpu", output)
    outcomes = synthesise_on_ray(folders, here, CohortProgress(len(folders)), workers=2)
    thread.join()
    assert killed
    assert "was lost" in capfd.readouterr().err
    assert sorted(outcome.case for outcome in outcomes) == sorted(folder.name for folder in folders)
    assert {outcome.case: outcome.status for outcome in outcomes if outcome.status != "written"} == {
        "BraTS-BAD": "failed"
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = tmp_path / "alone"
    synthesise_cohort(folders, Synthesizer(work.weights, slow, "cpu"), alone)
    assert sorted(os.listdir(output)) == sorted(os.listdir(alone))  # noqa: PTH208
    again = synthesise_on_ray(folders, here, CohortProgress(len(folders)), workers=1)
    assert {outcome.status for outcome in again} == {"skipped", "failed"}


@pytest.mark.parametrize(
    ("machines", "workers", "cores"),
    [
        ([16] * 4, 2, 16),
        ([16, 16], 1, 16),
        ([2] * 8, 4, 2),
        ([2] * 8, 16, 1),
        ([2] * 8, 17, 1),
        ([8, 3], 3, 3),
        ([0], 1, 1),
    ],
)
def test_every_worker_finds_a_machine(machines: list[int], workers: int, cores: int) -> None:
    assert cores_each(machines, workers) == cores


def test_a_cluster_that_kills_every_worker_for_memory_ends_the_run_with_the_reason(
    work: Work, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")  # any use is too much
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    folders = find_cases(cases)
    here = Work(work.weights, load_settings(None, ["sampler.steps=1000"]), "cpu", tmp_path)
    with pytest.raises(CwdmError, match="no worker can be started"):
        synthesise_on_ray(folders, here, CohortProgress(len(folders)), workers=1)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_as_every_stopped_run_does(how: int, work: Work, cases: Path, tmp_path: Path) -> None:
    paths = [f"--data_path={cases}", f"--output_path={tmp_path}", f"--weights={work.weights}"]
    start = [sys.executable, "-m", "cwdm", "infer", *paths, "--ray=local", "--devices=1", "sampler.steps=1000"]
    process = subprocess.Popen(
        start,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    )
    assert process.stderr is not None
    # The first in the order of the cases; before it Ray may say something of its own.
    assert any("BraTS-BAD FAILED" in line for line in process.stderr), "ended before a case failed"
    time.sleep(2)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + how, said
    assert "run the same command again" in said


def test_a_run_is_recorded_and_cleaned_up_once(work: Work, cases: Path, tmp_path: Path) -> None:
    folders, report = find_cases(cases), tmp_path / "report"
    here = Work(work.weights, work.settings, "cpu", tmp_path / "output", report=report)
    synthesise_on_ray(folders, here, CohortProgress(len(folders)), workers=2)
    (record,) = report.glob("run-*.json")
    assert len(json.loads(record.read_text())["cases"]) == len(folders)


def test_no_cluster_at_an_address(work: Work, cases: Path) -> None:
    with pytest.raises(CwdmError, match="no Ray cluster at 127"):
        synthesise_on_ray(find_cases(cases), work, CohortProgress(1), address="127.0.0.1:1")


def test_an_output_that_cannot_be_written_ends_the_run(work: Work, cases: Path, tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    with pytest.raises(OutputError):
        synthesise_on_ray(find_cases(cases), Work(work.weights, work.settings, "cpu", file), CohortProgress(1))


def test_weights_that_are_not_there_end_the_run_with_the_reason(cases: Path, tmp_path: Path) -> None:
    work = Work(tmp_path / "none", load_settings(None, []), "cpu", tmp_path / "output")
    with pytest.raises(WeightsError, match="no weights at"):
        synthesise_on_ray(find_cases(cases), work, CohortProgress(1))
