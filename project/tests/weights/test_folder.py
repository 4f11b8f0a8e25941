import hashlib
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from support import TINY
from typer.testing import CliRunner

from cwdm import Synthesizer, checkpoint
from cwdm.checkpoint import ANY, Record, load_published
from cwdm.errors import WeightsError
from cwdm.images.cases import MODALITIES
from cwdm.unet import UNet, UNetConfig
from cwdm.weights import folder as weights
from cwdm.weights.folder import BUNDLED, PUBLISHED_FILES, folder_of, inspect, load_for
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
    assert list(weights.recorded(tmp_path)) == ["t2_gen.pt"]


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
    assert weights.recorded(tmp_path)["t1_gen.pt"]["revision"] == COMMIT[::-1]


def test_download_takes_the_repositorys_file_that_is_there_already(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "t1_gen.pt").write_bytes(hub.files["t1_gen.pt"])
    assert weights.download(tmp_path, "someone/weights", files=("t1_gen.pt",))
    assert "GET" not in "".join(hub.requests)
    assert weights.recorded(tmp_path)["t1_gen.pt"]["sha256"] == checkpoint.sha256(tmp_path / "t1_gen.pt")


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


def test_published_and_own_files_are_found_in_a_folder(published_file: Path, tmp_path: Path) -> None:
    for name in PUBLISHED_FILES.values():
        (tmp_path / name).write_bytes(published_file.read_bytes())
    assert {m: weights.find(tmp_path, m).name for m in MODALITIES} == PUBLISHED_FILES
    checkpoint.save(tmp_path / "t1c.safetensors", load_published(untrained_state(TINY)), Record(modality="t1c"))
    assert weights.find(tmp_path, "t1c").name == "t1c.safetensors"
    assert weights.load_for(tmp_path, "t1c").warnings == ()


def test_the_newest_checkpoint_of_the_published_training_is_found(published_file: Path, tmp_path: Path) -> None:
    for name in ("brats_010000.pt", "brats_990000.pt", "brats_1200000.pt", "brats_best.pt", "brats_99.pt"):
        (tmp_path / name).write_bytes(published_file.read_bytes())
    loaded = weights.load_for(tmp_path, "t2f")
    assert loaded.path == tmp_path / "brats_1200000.pt"
    assert loaded.warnings == ("brats_1200000.pt does not say which contrast it synthesises; taken for t2f",)
    (tmp_path / "t2f").mkdir()
    (tmp_path / "t2f" / "brats_000100.pt").write_bytes(published_file.read_bytes())
    loaded = weights.load_for(tmp_path, "t2f")
    assert (loaded.path, loaded.warnings) == (tmp_path / "t2f" / "brats_000100.pt", ())


def test_a_file_is_taken_as_it_is_unless_it_says_otherwise(published_file: Path, tmp_path: Path) -> None:
    assert weights.load_for(published_file, "t1n").warnings
    checkpoint.save(tmp_path / "mine.safetensors", load_published(untrained_state(TINY)), Record(modality="t2w"))
    assert weights.load_for(tmp_path / "mine.safetensors", "t2w").record.modality == "t2w"
    with pytest.raises(WeightsError, match="synthesises t2w, but t1n is missing"):
        weights.load_for(tmp_path / "mine.safetensors", "t1n")


def test_missing_and_unconditional_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights for t1n .* looked for t1n.safetensors, t1_gen.pt"):
        weights.find(tmp_path, "t1n")
    config = UNetConfig(in_channels=8, model_channels=32, channel_mult=(1, 2), skips="additive")
    torch.save(untrained_state(config), tmp_path / "t1_gen.pt")
    with pytest.raises(WeightsError, match="unconditional"):
        weights.load_for(tmp_path, "t1n")


def test_notice_becomes_a_warning(tmp_path: Path) -> None:
    notice = "trained on phantoms, not for clinical use"
    record = Record(modality="t1n", notice=notice)
    checkpoint.save(tmp_path / "t1n.safetensors", load_published(untrained_state(TINY)), record)
    assert weights.load_for(tmp_path, "t1n").warnings == (notice,)


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


def test_convert_needs_to_know_the_contrast(published_file: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--modality"):
        weights.convert(published_file, tmp_path / "a.safetensors", None, torch.float32)
    weights.convert(published_file, tmp_path / "a.safetensors", "t1c", torch.float32)
    assert checkpoint.load(tmp_path / "a.safetensors").record.modality == "t1c"


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


def test_weights_that_differ_from_their_checksum_are_not_used(published_file: Path, tmp_path: Path) -> None:
    (tmp_path / "t1_gen.pt").write_bytes(published_file.read_bytes())
    weights.record(tmp_path, "t1_gen.pt", {"sha256": "0" * 64})
    weights.record(tmp_path, "t2_gen.pt", {"sha256": "0" * 64})
    with pytest.raises(WeightsError, match=r"checksums\.json beside it says 0000"):
        weights.load_for(tmp_path, "t1n")
    faults = [listed.fault for listed in weights.inspect(tmp_path)]
    assert "recorded 0000" in faults[0]
    assert "not there" in faults[1]


def test_networks_for_another_number_of_conditions_are_refused(tmp_path: Path) -> None:
    config = UNetConfig(in_channels=24, model_channels=32, channel_mult=(1, 2))
    torch.save(untrained_state(config), tmp_path / "t1_gen.pt")
    with pytest.raises(WeightsError, match="24 inputs, 8 outputs and 0 targets"):
        weights.load_for(tmp_path, "t1n")


def test_a_files_name_tells_more_than_its_folders() -> None:
    assert weights.modality_of(Path("t1n/flair_gen.pt")) == "t2f"
    assert weights.modality_of(Path("t1n/brats_100000.pt")) == "t1n"
    assert weights.modality_of(Path("somewhere/brats_100000.pt")) is None


def test_damaged_checksums_are_said(published_file: Path, tmp_path: Path) -> None:
    (tmp_path / "t1_gen.pt").write_bytes(published_file.read_bytes())
    (tmp_path / "checksums.json").write_text("{")
    with pytest.raises(WeightsError, match=r"checksums\.json"):
        list(weights.inspect(tmp_path))


ANY_CONFIG = UNetConfig(in_channels=40, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, groups=8, targets=4)


def test_one_file_for_any_contrast_serves_those_without_one_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "any.safetensors", UNet(ANY_CONFIG), Record(modality=ANY, window="brain"))
    torch.save(untrained_state(TINY), tmp_path / "t1_gen.pt")
    synthesizer = Synthesizer(tmp_path, device="cpu")
    assert [synthesizer.load(m).path.name for m in ("t1c", "t1n", "t2w", "t2f")] == [
        "any.safetensors",
        "t1_gen.pt",
        "any.safetensors",
        "any.safetensors",
    ]
    assert synthesizer.load("t2w") is synthesizer.load("t2f")  # not read again


def test_a_network_that_contradicts_its_record_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.safetensors", UNet(ANY_CONFIG), Record(modality="t1n"))
    with pytest.raises(WeightsError, match="says that it synthesises t1n"):
        load_for(tmp_path / "a.safetensors", "t1n")
    checkpoint.save(tmp_path / "b.safetensors", UNet(TINY), Record(modality=ANY))
    with pytest.raises(WeightsError, match="says that it synthesises any"):
        load_for(tmp_path / "b.safetensors", "t1n")


def test_bundled_weights_load_and_say_what_they_are() -> None:
    (listed,) = inspect(folder_of(BUNDLED))
    assert listed.verified
    assert listed.loaded is not None
    record = listed.loaded.record
    assert record.modality == ANY
    assert "not for clinical use" in record.notice
    assert listed.path.stat().st_size < 12e6
    for modality in ("t1n", "t1c", "t2w", "t2f"):
        assert record.notice in load_for(folder_of(BUNDLED), modality).warnings
