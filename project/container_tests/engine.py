"""A container engine for the tests: the one that is running, or Debian's own, installed and started here.

Nothing is pulled: where no engine runs, a base image is made from Debian's packages too.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "cwdm-test-base:2"
IMAGE = "cwdm-test"
STATE = Path("/var/tmp/cwdm-engine")
NO_NETWORK = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")
PACKAGES = "ca-certificates,gcc,libc6-dev,python3,python3-dev,python3-pip,python3-venv"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


class NoEngine(Exception):
    """No engine runs here and none can be started."""


@dataclass(frozen=True)
class Engine:
    """A running engine.

    Attributes:
        environment: for clients, with DOCKER_HOST where the engine is not the usual one.
        own: it was started here, with no network but the host's.
    """

    environment: Mapping[str, str]
    own: bool

    def docker(self, *arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run the client; returns whatever came of it."""
        command = [self.client, *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)

    @property
    def client(self) -> str:
        """Debian's client knows Debian's engine; another one on the path may not."""
        return "/usr/bin/docker" if self.own else "docker"


@contextmanager
def running_engine() -> Iterator[Engine]:
    """The engine that answers, else one that is started for as long as the block lasts.

    Raises:
        NoEngine: with the reason.
    """
    usual = Engine(os.environ, own=False)
    if shutil.which("docker") and usual.docker("info").returncode == 0:
        yield usual
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoEngine("no container engine answers, and only root on Debian or Ubuntu can install one here")
    _install()
    STATE.mkdir(exist_ok=True)
    socket = f"unix://{STATE}/docker.sock"
    command = ["dockerd", f"--data-root={STATE}/data", f"--exec-root={STATE}/exec", f"-p={STATE}/pid", f"-H={socket}"]
    with (STATE / "log").open("wb") as log:
        daemon = subprocess.Popen([*command, *NO_NETWORK], stdout=log, stderr=log)
    engine = Engine({**os.environ, "DOCKER_HOST": socket, "DOCKER_BUILDKIT": "1"}, own=True)
    try:
        _wait(engine, daemon)
        yield engine
    finally:
        daemon.terminate()
        daemon.wait(60)


def _install() -> None:
    needed = [name for name, tool in (("docker.io", "dockerd"), ("mmdebstrap", "mmdebstrap")) if not shutil.which(tool)]
    if needed:
        _checked("apt-get", "update", "-qq")
        _checked("apt-get", "install", "-y", "-qq", "--no-install-recommends", *needed)


def _wait(engine: Engine, daemon: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if engine.docker("info").returncode == 0:
            return
        if daemon.poll() is not None:
            break
        time.sleep(0.2)
    raise NoEngine(f"the engine did not start:\n{(STATE / 'log').read_text()[-2000:]}")


def _checked(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NoEngine(f"{' '.join(map(str, command))}:\n{done.stdout[-3000:]}")


def build_base(engine: Engine) -> str:
    """The base image for an engine without a registry: Debian's smallest system, with Python and our certificates."""
    if engine.docker("image", "inspect", BASE).returncode:
        archive = STATE / "base.tar"
        _checked(
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={PACKAGES}",
            f"--customize-hook=upload {CERTIFICATES} {CERTIFICATES}",
            "bookworm",
            archive,
        )
        imported = engine.docker("import", archive, BASE)
        archive.unlink()
        assert imported.returncode == 0, imported.stderr
    return BASE


def build_context(folder: Path) -> Path:
    """What `docker build` sees of a fresh checkout, with PyTorch's wheel where pip on this host has its own."""
    for name in ("Dockerfile", ".dockerignore", "LICENSE", "requirements.txt", "requirements-scans.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "project/cwdm", folder / "project/cwdm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "project/pyproject.toml", folder / "project")
    (folder / "workspace/weights").mkdir(parents=True)
    (folder / "workspace/weights/.gitkeep").touch()
    torch = next(line.split()[0] for line in (ROOT / "requirements.txt").open() if line.startswith("torch=="))
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder / 'wheels'}", torch]
    subprocess.run(download, check=True)
    return folder


def build_image(engine: Engine, context: Path, name: str, **arguments: str) -> subprocess.CompletedProcess[str]:
    """`docker build` of the project's own Dockerfile, and what came of it."""
    network = ("--network=host",) if engine.own else ()
    base = {"BASE_IMAGE": build_base(engine)} if engine.own else {}
    options = [f"--build-arg={key}={value}" for key, value in {**base, **arguments}.items()]
    return engine.docker("build", "--progress=plain", *network, *options, f"--tag={name}", context, timeout=1800)


def main() -> None:
    """Build ahead what the tests will find built; why it cannot be, they say."""
    with suppress(NoEngine), running_engine() as engine, tempfile.TemporaryDirectory() as folder:
        build_image(engine, build_context(Path(folder)), IMAGE)


if __name__ == "__main__":
    main()
