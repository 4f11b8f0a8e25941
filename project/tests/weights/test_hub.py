"""Downloads from a hub on this machine, and conversions."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from support import TINY
from typer.testing import CliRunner

from cwdm import checkpoint, weights
from cwdm.errors import WeightsError
from cwdm.files import sha256
from cwdm.images.cases import MODALITIES
from cwdm.weights.folder import PUBLISHED_FILES, recorded
from cwdm.weights.listing import inspect
from cwdm.weights.untrained import untrained_state

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "any.pt"
    torch.save(untrained_state(TINY), path)
    return path


class Hub(ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as its client needs to fetch a file."""

    files: dict[str, bytes]
    tags: dict[str, str]
    requests: list[str]
    commit: str


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        data = (
            self.server.files.get(name)
            if repo == "someone/weights" and revision in ("main", "v1", self.server.commit)
            else None
        )
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if repo == "someone/weights" else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{self.server.tags.get(name, hashlib.sha256(data).hexdigest())}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(published_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), HubHandler)
    data = published_file.read_bytes()
    server.files = dict.fromkeys(PUBLISHED_FILES.values(), data)
    server.tags = {}
    server.requests = []
    server.commit = COMMIT
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.shutdown()
    server.server_close()


def test_download_records_checksums_and_the_files_work(hub: Hub, tmp_path: Path) -> None:
    paths = weights.download(tmp_path / "w", "someone/weights", "v1")
    assert [path.name for path in paths] == list(PUBLISHED_FILES.values())
    entries = json.loads((tmp_path / "w" / "checksums.json").read_text())
    assert entries["t2_gen.pt"] == {
        "sha256": hashlib.sha256(hub.files["t2_gen.pt"]).hexdigest(),
        "repo": "someone/weights",
        "revision": COMMIT,
    }
    assert all(listed.verified and listed.loaded for listed in weights.inspect(tmp_path / "w"))
    for modality in MODALITIES:
        assert weights.load_for(tmp_path / "w", modality).model.config == TINY


def test_second_download_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    weights.download(tmp_path, "someone/weights")
    hub.requests.clear()
    weights.download(tmp_path, "someone/weights")
    assert not [request for request in hub.requests if request.startswith("GET")]


def test_download_keeps_a_file_of_the_users_own(hub: Hub, tmp_path: Path) -> None:
    own = tmp_path / "t1_gen.pt"
    own.write_bytes(b"a month of training")
    kept: list[str] = []
    files = ("t1_gen.pt", "t2_gen.pt")
    paths = weights.download(tmp_path, "someone/weights", files=files, on_kept=kept.append)
    assert own.read_bytes() == b"a month of training"
    assert [path.name for path in paths] == ["t2_gen.pt"]
    assert len(kept) == 1
    assert str(own) in kept[0]
    assert "move it away" in kept[0]
    assert list(recorded(tmp_path)) == ["t2_gen.pt"]


def test_download_keeps_a_file_that_took_a_downloaded_ones_place(hub: Hub, tmp_path: Path) -> None:
    (path,) = weights.download(tmp_path, "someone/weights", files=("t1_gen.pt",))
    before = path.stat()
    path.write_bytes(b"a month of training")
    os.utime(path, (before.st_atime, before.st_mtime - 100))  # as cp -p leaves it
    assert weights.download(tmp_path, "someone/weights", files=("t1_gen.pt",)) == []
    assert path.read_bytes() == b"a month of training"


def test_download_replaces_an_older_file_of_the_repository(hub: Hub, tmp_path: Path) -> None:
    new, hub.files["t1_gen.pt"] = hub.files["t1_gen.pt"], b"first revision"
    (path,) = weights.download(tmp_path, "someone/weights", files=("t1_gen.pt",))
    assert path.read_bytes() == b"first revision"
    hub.files["t1_gen.pt"], hub.commit = new, COMMIT[::-1]
    assert weights.download(tmp_path, "someone/weights", files=("t1_gen.pt",)) == [path]
    assert path.read_bytes() == new
    assert recorded(tmp_path)["t1_gen.pt"]["revision"] == COMMIT[::-1]


def test_download_takes_the_repositorys_file_that_is_there_already(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "t1_gen.pt").write_bytes(hub.files["t1_gen.pt"])
    assert weights.download(tmp_path, "someone/weights", files=("t1_gen.pt",))
    assert "GET" not in "".join(hub.requests)
    assert recorded(tmp_path)["t1_gen.pt"]["sha256"] == sha256(tmp_path / "t1_gen.pt")


def test_command_says_that_a_file_is_kept(hub: Hub, tmp_path: Path) -> None:
    from cwdm.cli.app import app

    (tmp_path / "t1_gen.pt").write_bytes(b"own")
    command = ["weights", "download", str(tmp_path), "--repo", "someone/weights", "--file", "t1_gen.pt"]
    result = CliRunner().invoke(app, [*command, "--file", "t2_gen.pt"])
    assert result.exit_code == 1
    assert "is kept" in " ".join(result.stderr.split())
    assert (tmp_path / "t1_gen.pt").read_bytes() == b"own"
    assert (tmp_path / "t2_gen.pt").exists()


def test_download_with_another_checksum_than_the_hubs_is_removed(hub: Hub, tmp_path: Path) -> None:
    hub.tags["t1_gen.pt"] = "0" * 64
    with pytest.raises(WeightsError, match="expected 0000"):
        weights.download(tmp_path, "someone/weights", files=("t1_gen.pt",))
    assert not (tmp_path / "t1_gen.pt").exists()


@pytest.mark.parametrize(
    ("repo", "revision", "file"),
    [
        ("no/such", "main", "t1_gen.pt"),
        ("someone/weights", "nothing", "t1_gen.pt"),
        ("someone/weights", "main", "no.pt"),
        ("not a repo!", "main", "t1_gen.pt"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path, repo: str, revision: str, file: str) -> None:
    with pytest.raises(WeightsError, match=f"{file} could not be downloaded from {repo}"):
        weights.download(tmp_path, repo, revision, (file,))


def test_no_connection_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(WeightsError, match=r"t1_gen\.pt could not be downloaded"):
        weights.download(tmp_path, "someone/weights")


def test_convert_list_and_verify_from_the_shell(published_file: Path, tmp_path: Path) -> None:
    from cwdm.cli.app import app

    shell = CliRunner()
    source, target = tmp_path / "flair_gen.pt", tmp_path / "ours" / "t2f.safetensors"
    source.write_bytes(published_file.read_bytes())
    target.parent.mkdir()
    assert shell.invoke(app, ["weights", "convert", str(source), str(target), "--dtype", "float16"]).exit_code == 0
    assert checkpoint.load(target).record.modality == "t2f"
    assert target.stat().st_size < 0.6 * source.stat().st_size
    listing = shell.invoke(app, ["weights", "list", str(target.parent)])
    assert "t2f.safetensors" in listing.stdout
    assert shell.invoke(app, ["weights", "verify", str(target.parent)]).exit_code == 0
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    assert shell.invoke(app, ["weights", "verify", str(target.parent)]).exit_code == 1
    assert shell.invoke(app, ["weights", "verify", str(tmp_path / "none")]).exit_code == 1


def test_convert_needs_to_know_the_modality(published_file: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--modality"):
        weights.convert(published_file, tmp_path / "a.safetensors", None, torch.float32)
    weights.convert(published_file, tmp_path / "a.safetensors", "t1c", torch.float32)
    assert checkpoint.load(tmp_path / "a.safetensors").record.modality == "t1c"


KILL_AT_EACH_NAME = """
import itertools, os, shutil, sys
from pathlib import Path
import torch
from cwdm.weights.hub import convert

source, before, work = map(Path, sys.argv[1:])
named = 0

def stop(event, _):
    global named
    named += event in ("os.link", "os.rename")
    if named == last:
        os._exit(9)

for last in itertools.count(1):
    folder = work / str(last)
    shutil.copytree(before, folder)
    if not (child := os.fork()):
        sys.addaudithook(stop)
        convert(source, folder / "t1c.safetensors", "t1c", torch.float16)
        os._exit(0)
    if (code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) != 9:
        sys.exit(code)
"""


@pytest.mark.parametrize("again", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_conversion_killed_at_any_point_can_be_repeated(again: bool, published_file: Path, tmp_path: Path) -> None:
    """Each time that a file is about to get its name; what is there by then is used as before."""
    before, work = tmp_path / "before", tmp_path / "work"
    before.mkdir()
    if again:
        weights.convert(published_file, before / "t1c.safetensors", "t1c", torch.float32)
    subprocess.run([sys.executable, "-c", KILL_AT_EACH_NAME, published_file, before, work], check=True)
    killed = sorted(work.iterdir(), key=lambda folder: int(folder.name))[:-1]  # the last one came to its end
    assert len(killed) > 2
    for folder in killed:
        if again or (folder / "t1c.safetensors").exists():
            assert weights.load_for(folder, "t1c").record.modality == "t1c"
        target = weights.convert(published_file, folder / "t1c.safetensors", "t1c", torch.float16)
        entries = json.loads((folder / "checksums.json").read_text())
        assert entries == {target.name: {"sha256": sha256(target), "converted_from": sha256(published_file)}}
        assert [one.verified for one in inspect(folder)] == [True]


def test_convert_replaces_nothing_but_an_earlier_conversion(published_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "t1c.safetensors"
    weights.convert(published_file, target, "t1c", torch.float32)
    weights.convert(published_file, target, "t1c", torch.float16)
    before = target.read_bytes()
    with pytest.raises(WeightsError, match="no earlier conversion of another file"):
        weights.convert(target, target, "t1c", torch.float32)
    assert target.read_bytes() == before
    target.write_bytes(b"my own")
    with pytest.raises(WeightsError, match="move it away"):
        weights.convert(published_file, target, "t1c", torch.float32)
    assert target.read_bytes() == b"my own"
