import contextlib
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import TINY, golden, golden_model

from cwdm import checkpoint
from cwdm.checkpoint import Record, load_published
from cwdm.diffusion import SCHEDULES
from cwdm.errors import WeightsError
from cwdm.files import sha256
from cwdm.safetensors_file import write_tensors
from cwdm.unet import UNet, UNetConfig
from cwdm.weights.untrained import untrained_state

SMALL = UNetConfig(in_channels=8, model_channels=32, channel_mult=(1, 2), skips="wavelet")


@pytest.mark.parametrize(
    ("skips", "blocks"),
    [(s, b) for s in ("concat", "additive", "wavelet") for b in (1, 2, 3) if (s, b) != ("wavelet", 1)],
)
@pytest.mark.parametrize("mult", [(1, 2), (1, 2, 2), (1, 1, 3)])
def test_architecture_is_read_off_names_and_shapes(skips: str, blocks: int, mult: tuple[int, ...]) -> None:
    config = UNetConfig(in_channels=32, model_channels=32, channel_mult=mult, num_res_blocks=blocks, skips=skips)
    assert load_published(untrained_state(config)).config == config


def test_a_wavunet_of_one_block_a_level_is_refused() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        UNetConfig(in_channels=8, model_channels=32, num_res_blocks=1, skips="wavelet")


def test_a_block_under_two_names_takes_the_later_one() -> None:
    state = untrained_state(SMALL)
    model = load_published(state)
    assert torch.equal(model.body.decoder[0].blocks[1].first.conv.weight, state["output_blocks.2.0.in_layers.2.weight"])


def test_round_trip_through_a_published_file(tmp_path: Path) -> None:
    state = untrained_state(TINY)
    torch.save(state, tmp_path / "t2_gen.pt")
    loaded = checkpoint.load(tmp_path / "t2_gen.pt")
    assert loaded.model.config == TINY
    assert loaded.record.value_range == (0, 1)
    assert torch.equal(loaded.model.stem.weight, state["input_blocks.0.0.weight"])
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    checkpoint.save(f"{tmp_path}/own.safetensors", UNet(TINY), Record(modality="t1n"))
    assert checkpoint.load(f"{tmp_path}/own.safetensors").record.modality == "t1n"
    with pytest.raises(WeightsError, match="no such weights file"):
        checkpoint.load(f"{tmp_path}/none.safetensors")


def test_unconditional_published_files_get_their_value_range(tmp_path: Path) -> None:
    torch.save(untrained_state(SMALL), tmp_path / "brats_unet_128_1200k.pt")
    assert checkpoint.load(tmp_path / "brats_unet_128_1200k.pt").record.value_range == (-1, 1)


@pytest.mark.parametrize("name", ["wdm_unet_c32", "wdm_wavunet_c32"])
def test_round_trip_through_our_file(tmp_path: Path, name: str) -> None:
    run = golden("unet.json")[name]
    model = golden_model(run)
    record = Record(modality="t2f", sampler="dpmpp", steps=10, training={"cases": 3})
    checkpoint.save(tmp_path / "t2f.safetensors", model, record)
    loaded = checkpoint.load(tmp_path / "t2f.safetensors")
    assert (loaded.model.config, loaded.record) == (model.config, record)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), model.parameters(), strict=True))
    assert loaded.sha256 == sha256(tmp_path / "t2f.safetensors")


def test_half_precision_files_load_as_float32(tmp_path: Path) -> None:
    model = load_published(untrained_state(TINY))
    checkpoint.save(tmp_path / "a.safetensors", model, Record(), torch.float16)
    loaded = checkpoint.load(tmp_path / "a.safetensors").model
    assert loaded.stem.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.stem.weight, model.stem.weight, atol=1e-3, rtol=1e-3)


def test_every_fault_of_a_state_dict_is_listed() -> None:
    state = untrained_state(TINY)
    del state["out.0.weight"]
    state["extra"] = torch.zeros(1)
    state["time_embed.0.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError) as error:
        load_published(state)
    message = str(error.value)
    assert "missing: 1 tensors (out.0.weight)" in message
    assert "left over: 1 tensors (extra)" in message
    assert "time_embed.0.bias (3,) instead of (128,)" in message


def test_weights_of_something_else_are_refused() -> None:
    with pytest.raises(WeightsError, match="not the weights of a WDM or cWDM network"):
        load_published(torch.nn.Linear(3, 4).state_dict())


def test_weights_that_are_not_finite_are_refused() -> None:
    state = untrained_state(TINY)
    state["out.2.bias"][0] = torch.nan
    with pytest.raises(WeightsError, match=r"NaN or infinity in 1 tensors \(head.conv.bias\)"):
        load_published(state)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    ran = tmp_path / "ran"
    torch.save({"a": Malicious(ran)}, tmp_path / "t1_gen.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError):
        checkpoint.load(tmp_path / "t1_gen.pt")
    assert not ran.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "t1_gen.pt").write_bytes(pickle.dumps(Malicious(ran)))
    with pytest.raises(WeightsError):
        checkpoint.load(tmp_path / "t1_gen.pt")
    assert not ran.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
@pytest.mark.parametrize("name", ["t1_gen.pt", "t1n.safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(untrained_state(TINY), path)
    else:
        checkpoint.save(path, load_published(untrained_state(TINY)), Record())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match="again"):
        checkpoint.load(path)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    state = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in untrained_state(TINY).items()}
    torch.save(state, tmp_path / "t1_gen.pt")
    with pytest.raises(WeightsError, match="more than the file holds"):
        checkpoint.load(tmp_path / "t1_gen.pt")


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(128).to_sparse(),
        torch.empty(128, device="meta"),
        torch.zeros(128, dtype=torch.complex64),
        torch.zeros(128, dtype=torch.int64),
        torch.nested.nested_tensor([torch.zeros(100), torch.zeros(28)]),
        [1.0] * 128,
    ],
    ids=["sparse", "meta", "complex", "integer", "nested", "list"],
)
def test_tensors_of_another_kind_are_refused(tmp_path: Path, odd: object) -> None:
    state: dict[str, object] = dict(untrained_state(TINY))
    state["time_embed.0.bias"] = odd
    torch.save(state, tmp_path / "t1_gen.pt")
    with pytest.raises(WeightsError):
        checkpoint.load(tmp_path / "t1_gen.pt")


@pytest.mark.parametrize("key", [7, (1, 2), None, b"out.0.weight"], ids=["integer", "tuple", "none", "bytes"])
def test_keys_that_are_no_names_are_refused(tmp_path: Path, key: object) -> None:
    torch.save({**untrained_state(TINY), key: torch.zeros(1)}, tmp_path / "t1_gen.pt")
    with pytest.raises(WeightsError, match=r"names and tensors, found 1 tensors \("):
        checkpoint.load(tmp_path / "t1_gen.pt")


def test_names_reach_messages_short_and_without_escape_sequences() -> None:
    with pytest.raises(WeightsError) as error:
        load_published({**untrained_state(TINY), "\x1b[2J" + 10**6 * "a": torch.zeros(1)})
    assert "left over: 1 tensors (\\x1b[2Jaaa" in str(error.value)
    assert len(str(error.value)) < 200


def test_damaged_pickles_are_refused_whatever_they_raise(tmp_path: Path) -> None:
    config = UNetConfig(in_channels=32, model_channels=8, channel_mult=(1,), num_res_blocks=1, groups=1)
    torch.save(untrained_state(config), tmp_path / "whole.pt")
    random = np.random.RandomState(0)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    for _ in range(60):
        damaged = bytearray(entries[pickled])
        for position in random.randint(0, len(damaged), 3):
            damaged[position] = random.randint(0, 256)
        with zipfile.ZipFile(tmp_path / "t1_gen.pt", "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, bytes(damaged) if name == pickled else data)
        with contextlib.suppress(WeightsError):  # it may also be read: not every byte matters
            checkpoint.load(tmp_path / "t1_gen.pt")


def test_loaded_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    torch.save(untrained_state(TINY), tmp_path / "t1_gen.pt")
    model = checkpoint.load(tmp_path / "t1_gen.pt").model
    before = model.stem.weight.clone()
    (tmp_path / "t1_gen.pt").write_bytes(b"")
    assert torch.equal(model.stem.weight, before)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save(untrained_state(TINY), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "t1_gen.pt", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed"):
        checkpoint.load(tmp_path / "t1_gen.pt")


HEADER = json.dumps({"config": {"in_channels": 32}, "record": {"training": {"a": "x"}}})


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (None, "no 'cwdm' entry"),
        ("{", "cannot be understood"),
        ("[]", "cannot be understood"),
        ("[" * 10**5 + "]" * 10**5, "cannot be understood"),
        (HEADER.replace('"x"', "[" * 500 + "]" * 500), "cannot be understood"),
        (HEADER.replace('"x"', '{"a":' * 500 + "1" + "}" * 500), "cannot be understood"),
        (
            json.dumps({"config": {"in_channels": 32, "channel_mult": [1] * 10**5}, "record": {}}),
            "cannot be understood",
        ),
        (json.dumps({"config": {"in_channels": 32}, "record": {"steps": 0}}), "cannot be understood"),
        (json.dumps({"config": {"in_channels": 32}, "record": {"sampler": "magic"}}), "cannot be understood"),
        (json.dumps({"config": {"in_channels": 32}, "record": {"value_range": [0, 0]}}), "cannot be understood"),
        (json.dumps({"config": {"in_channels": 32}, "record": {"wavelet": "magic"}}), "cannot be understood"),
    ],
)
def test_crafted_headers_are_refused(tmp_path: Path, header: str | None, match: str) -> None:
    metadata = {"format": "pt"} if header is None else {"cwdm": header}
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "t1n.safetensors", metadata)
    for read in (checkpoint.load, checkpoint.read_record):
        with pytest.raises(WeightsError, match=match):
            read(tmp_path / "t1n.safetensors")


def rewrite(path: Path, **changes: object) -> None:
    """Change entries of our header; None takes one away."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    ours = {**json.loads(header["__metadata__"]["cwdm"]), **changes}
    ours = {name: value for name, value in ours.items() if value is not None}
    header["__metadata__"]["cwdm"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"format": 3}, "format 3, this version reads up to 1"),
        ({"format": 2, "config": None, "network": {}}, "format 2, this version reads up to 1"),
        (
            {"record": {"flow": True, "a\nb": 1}},
            r"its header has 2 unknown fields (a\nb, flow)",
        ),
        (
            {"config": {"in_channels": 32, "heads": 4}},
            "its header has 1 unknown fields (heads)",
        ),
    ],
)
def test_a_file_of_a_newer_version_is_told_in_one_sentence(
    tmp_path: Path, changes: dict[str, object], found: str
) -> None:
    path = tmp_path / "t1n.safetensors"
    checkpoint.save(path, load_published(untrained_state(TINY)), Record())
    rewrite(path, **changes)
    with pytest.raises(WeightsError) as caught:
        checkpoint.load(path)
    assert str(caught.value) == f"{path}: written by a newer cwdm ({found}); pip install --upgrade cwdm"


def test_a_file_without_a_format_number_loads_as_before(tmp_path: Path) -> None:
    path = tmp_path / "t1n.safetensors"
    checkpoint.save(path, load_published(untrained_state(TINY)), Record(modality="t1n"))
    new = checkpoint.load(path)
    rewrite(path, format=None)
    old = checkpoint.load(path)
    assert (old.record, old.model.config) == (new.record, new.model.config)


def test_intended_use_and_licence_are_said_where_they_are_known(tmp_path: Path) -> None:
    path = tmp_path / "t1n.safetensors"
    record = Record(intended_use="research on glioma, not diagnosis", licence="CC-BY-4.0")
    checkpoint.save(path, load_published(untrained_state(TINY)), record)
    assert checkpoint.load(path).record == record
    assert not {"intended_use", "licence"} & set(Record().model_dump(mode="json"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing\.pt: no such weights file"):
        checkpoint.load(tmp_path / "nothing.pt")


def test_saving_keeps_the_training_network_as_it_is(tmp_path: Path) -> None:
    model = UNet(TINY).train()
    checkpoint.save(tmp_path / "a.safetensors", model, Record())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_record_states_the_noise_schedule_which_a_regression_reckons_with(tmp_path: Path) -> None:
    config = UNetConfig(in_channels=16, model_channels=32, channel_mult=(1, 1), regression=True)
    model = UNet(config).eval()
    for name, schedule in SCHEDULES.items():
        checkpoint.save(tmp_path / f"{name}.safetensors", model, Record(schedule=name))
        loaded = checkpoint.load(tmp_path / f"{name}.safetensors")
        assert loaded.record.schedule == name
        assert loaded.model.regression.schedule is schedule
    x, t = torch.rand(1, 16, 4, 4, 4), torch.tensor([500])
    with torch.no_grad():
        assert not torch.equal(loaded.model(x, t), model(x, t))  # of cosine; the model is of linear
    with pytest.raises(ValueError, match="must be one of linear, cosine"):
        Record(schedule="sigmoid")
    rewrite(tmp_path / "linear.safetensors", record={})  # older files do not say
    assert checkpoint.read_record(tmp_path / "linear.safetensors").schedule == "linear"


def test_our_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    """Byte for byte, for tensors of every layout and length of header."""
    whole = torch.randn(2, 3, 4, 5, 6)
    tensors = {
        "turned": whole.to(memory_format=torch.channels_last_3d),
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 2),
        "über": whole[:, ::2],
        "half": torch.randn(3).half(),
        "double": torch.randn(3, dtype=torch.float64),
    }
    for length in range(8):
        write_tensors(tmp_path / "ours", tensors, {"note": "ö" * length})
        theirs = {name: tensor.contiguous() for name, tensor in tensors.items()}
        assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(theirs, {"note": "ö" * length})
