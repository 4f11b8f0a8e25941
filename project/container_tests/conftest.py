"""The image, built once, the cases it is run on, and the real clients that run it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import TINY, Clients, _environment, infer_bare, readable
from engine import IMAGE, ROOT, STATE, Engine, NoEngine, build_context, build_image, running_engine

from cwdm.checkpoint import Record
from cwdm.images.cases import find_cases
from cwdm.phantoms import write_phantoms
from cwdm.prepare.drop import drop_modalities
from cwdm.weights.untrained import write_untrained


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A container engine; where none can be had, a failure in CI and a skip on a laptop."""
    try:
        with running_engine() as engine:
            yield engine
    except NoEngine as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image is built from; tests put weights into copies of it."""
    return build_context(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="session")
def shipped(engine: Engine, context: Path) -> str:
    """The project's own image, built with the weights that come with it."""
    built = build_image(engine, context, IMAGE)
    assert built.returncode == 0, built.stderr[-5000:]
    return IMAGE


@pytest.fixture(scope="session")
def image(engine: Engine, shipped: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with one thread: two that wait for each other beside other tests take three times as long as one."""
    folder = tmp_path_factory.mktemp("one-core")
    (folder / "Dockerfile").write_text(f"FROM {shipped}\nENV OMP_NUM_THREADS=1\n")
    name = f"{shipped}-one-core"  # mlcube would take an h in -Pdocker.image=... for its option -h
    built = engine.docker("build", f"--tag={name}", folder)
    assert built.returncode == 0, built.stderr[-5000:]
    return name


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms, each without another contrast, and where they are at hand the real cases; only read."""
    complete, folder = tmp_path_factory.mktemp("complete"), tmp_path_factory.mktemp("cases")
    write_phantoms(complete, 3, seed=4, shape=(31, 32, 25), spacing_mm=6.5)
    drop_modalities(complete, folder, seed=1, copy=True)
    assert len({case.missing for case in find_cases(folder)}) > 1
    return readable(folder)


@pytest.fixture(scope="session")
def expected(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bare command line makes of the cases."""
    return infer_bare(cases, tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network for each contrast, whose images differ from those of the bundled ones."""
    folder = tmp_path_factory.mktemp("weights")
    write_untrained(folder, TINY, Record(sampler="ddim", steps=2))
    return readable(folder)


@pytest.fixture(scope="session")
def expected_tiny(cases: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bare command line makes of the cases with `tiny_weights`."""
    return infer_bare(cases, tmp_path_factory.mktemp("expected-tiny"), f"--weights={tiny_weights}")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An empty folder that any user may write to."""
    folder = tmp_path / "output"
    folder.mkdir()
    readable(folder).chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def clients(engine: Engine) -> "Clients":
    """Environments with the packages that run images: mlcube and brats."""
    folder = STATE if engine.own else Path.home() / ".cache/cwdm-container-test"
    return Clients(
        engine,
        _environment(folder / "mlcube", ["pip<24.1"], ["-r", str(ROOT / "mlcube/mlcube/requirements.txt")]),
        _environment(folder / "brats", ["pip"], ["brats==0.1.14"]),
    )
