from pathlib import Path

import pytest

from cwdm.errors import SettingsError
from cwdm.settings import Settings, load_settings
from cwdm.training.settings import load_training_settings

EVERYTHING = """
seed: 7
precision: fp32
noise: device
samples: 3
sampler: {name: ddim, steps: 20, timesteps: [3, 2, 1, 0], tau: null, bands: null}
output: {intensity: unit, background: threshold, threshold: 0.1, orient: false}
"""


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "parameters.yaml"
    path.write_text(text)
    return load_settings(path)


@pytest.mark.parametrize("text", ["", "null", "# only a comment", "{}", "sampler:\n  steps:\n", "sampler:", "seed:"])
def test_empty_means_defaults(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == Settings()


def test_defaults_are_the_documented_ones() -> None:
    settings = Settings()
    assert (settings.seed, settings.precision, settings.noise, settings.samples) == (42, "auto", "cpu", 1)
    assert (settings.sampler.name, settings.sampler.steps, settings.sampler.timesteps) == (None, None, None)
    output = settings.output
    assert (output.intensity, output.background, output.threshold, output.orient) == ("native", "mask", 0.04, True)


def test_every_key_is_read(tmp_path: Path) -> None:
    settings = read(tmp_path, EVERYTHING)
    assert settings.sampler.timesteps == [3, 2, 1, 0]
    assert settings.model_dump() == {
        "seed": 7,
        "precision": "fp32",
        "noise": "device",
        "samples": 3,
        "sampler": {"name": "ddim", "steps": 20, "timesteps": [3, 2, 1, 0], "tau": None, "bands": None},
        "output": {"intensity": "unit", "background": "threshold", "threshold": 0.1, "orient": False},
    }


def test_a_group_without_keys_can_be_overridden(tmp_path: Path) -> None:
    (path := tmp_path / "p.yaml").write_text("sampler:\n  # steps: 5\n")
    assert load_settings(path, ["sampler.steps=10"]).sampler.steps == 10


def test_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(EVERYTHING)
    settings = load_settings(path, ["seed=1", "sampler.steps=5", "sampler.timesteps=null"])
    assert (settings.seed, settings.sampler.steps, settings.sampler.timesteps) == (1, 5, None)
    assert settings.sampler.name == "ddim"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sead: 1", "unknown key 'sead'; did you mean 'seed'"),
        ("sampler: {stpes: 1}", "unknown key 'sampler.stpes'; did you mean 'steps'"),
        ("zzz: 1", "unknown key 'zzz'; known here: seed, precision"),
        ("seed: many", "seed: .*'many'"),
        ("seed: 1.5", "seed: .*1.5"),
        ("seed: -1", "seed: "),
        ("samples: '3'", "samples: "),
        ("samples: 0", "samples: "),
        ("precision: fp16", "precision: .*'fp16'"),
        ("sampler: ddpm", "sampler: "),
        ("sampler: {name: magic}", "sampler.name: .*'magic'"),
        ("sampler: {steps: 1001}", "sampler.steps: .*1001"),
        ("sampler: {timesteps: [0, 1]}", r"sampler.timesteps: must be a falling list .*\[0, 1\]"),
        ("sampler: {timesteps: []}", "sampler.timesteps: must be"),
        ("sampler: {timesteps: [1000]}", "sampler.timesteps: must be"),
        ("sampler: {tau: 300}", "tau and bands belong to name: texture"),
        ("sampler: {name: texture, tau: 999}", "sampler.tau: .*999"),
        ("sampler: {name: texture, bands: [LLX]}", "sampler.bands.*'LLX'"),
        ("sampler: {name: texture, tau: 9, timesteps: [999, 8]}", "timesteps say tau themselves"),
        ("sampler: {name: mean, steps: 5}", "mean takes neither steps nor timesteps"),
        ("output: {orient: 'yes'}", "output.orient: "),
        ("output: {threshold: 2}", "output.threshold: "),
        ("- a list", "expected 'key: value' lines, found a list"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nsampler: {steps: 5}\nseed: 2", "'seed' stands twice .*line 3"),
        ("sampler: {steps: 5, steps: 6}", "'steps' stands twice"),
        ("[a]: 1", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("[" * 5000, "not valid YAML"),
        ("seed: 2024-13-45", "seed: .*'2024-13-45'"),
        ("seed: 0x_", "seed: .*'0x_'"),
        ("seed: 1_000", "seed: .*'1_000'"),
        ("seed: 1:30", "seed: .*'1:30'"),
        ("seed: !!int many", "not valid YAML"),
        ("#" * (1 << 21), "larger than 1 MiB"),
        ("seed: !!bool x", "'x' is no bool"),
        ("seed: !!float ''", "'' is no float"),
        ("seed: !!timestamp 99", "not valid YAML"),
        ("precision: !!timestamp x", "not valid YAML"),
        ("precision: !!binary aGk=", "not valid YAML"),
        ("seed: !!omap [a: 1]", "not valid YAML"),
        (f"seed: 0x{'f' * 6000}", "a number of 6002 digits"),
        ("sampler: {preset: [1]}", "preset must be one of exact, balanced, fast"),
        ("sampler: {preset: {a: 1}}", "preset must be one of exact, balanced, fast"),
        ("sampler: {preset: fast, 1: 2}", "leave out 1"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "override", ["sampler.preset=[1]", "sampler.preset={a: 1}", "seed=!!bool x", f"{'a.' * 2000}b=1"]
)
def test_overrides_that_hold_anything_are_settings_errors(override: str) -> None:
    with pytest.raises(SettingsError):
        load_settings(None, [override])


def test_text_that_no_encoding_knows_is_no_wavelet() -> None:
    with pytest.raises(SettingsError, match="is no orthogonal wavelet"):
        load_training_settings("cwdm-any", ["data.path=x", "out=y", 'network.wavelet="\\ud800"'])


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        read(tmp_path, "seed: a\nsamples: b\nnonsense: 1")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    "override", ["seed=2024-13-45", "seed", "=3", "seed.a=3", "sampler=", "sampler.steps=[", "steps=3"]
)
def test_bad_overrides_are_named(tmp_path: Path, override: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("seed: 3")
    if override == "sampler=":
        assert load_settings(path, [override]) == load_settings(path)
        return
    with pytest.raises(SettingsError):
        load_settings(path, [override])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SettingsError, match=r"binary\.yaml"):
        load_settings(tmp_path / "binary.yaml")


def test_a_preset_names_sampler_and_steps() -> None:
    fast = load_settings(None, ["sampler.preset=fast"]).sampler
    assert (fast.name, fast.steps) == ("dpmpp", 5)
    assert load_settings(None, ["sampler.preset=exact"]).sampler.steps == 1000


def test_what_texture_does_is_told_by_settings() -> None:
    told = load_settings(None, ["sampler.name=texture", "sampler.tau=200", "sampler.bands=[HHH]"]).sampler
    assert (told.tau, told.bands) == (200, ["HHH"])
    assert load_settings(None, ["sampler.preset=mean"]).sampler.name == "mean"


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SettingsError, match="exact, balanced, fast"):
        load_settings(None, ["sampler.preset=quick"])


@pytest.mark.parametrize("other", ["sampler.steps=3", "sampler.name=ddim", "sampler.timesteps=[3, 2]"])
def test_a_preset_and_something_else_is_refused(other: str) -> None:
    with pytest.raises(SettingsError, match="preset"):
        load_settings(None, ["sampler.preset=fast", other])


@pytest.mark.parametrize(
    ("text", "seed"), [("010", 10), ("08", 8), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("-0", 0), ("9" * 18, 10**18 - 1)]
)
def test_integers_are_those_of_yaml_1_2(text: str, seed: int, tmp_path: Path) -> None:
    assert load_settings(None, [f"seed={text}"]).seed == seed
    assert read(tmp_path, f"seed: {text}").seed == seed


@pytest.mark.parametrize(
    ("text", "threshold"), [("4e-2", 0.04), ("4E-2", 0.04), ("+.5", 0.5), ("1.", 1.0), ("25.e-2", 0.25), ("00.5", 0.5)]
)
def test_floats_are_those_of_yaml_1_2(text: str, threshold: float, tmp_path: Path) -> None:
    assert load_settings(None, [f"output.threshold={text}"]).output.threshold == threshold
    assert read(tmp_path, f"output: {{threshold: {text}}}").output.threshold == threshold


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e", "4e-2x"])
def test_what_is_no_number_or_without_end_is_no_threshold(text: str) -> None:
    with pytest.raises(SettingsError, match=r"output\.threshold: "):
        load_settings(None, [f"output.threshold={text}"])


def test_training_settings_read_numbers_in_the_same_way() -> None:
    overrides = ["data.path=data", "out=2024-01-15", "optimiser.warmup_steps=010", "optimiser.lr=4e-5"]
    overrides += ["data.target=null", "data.layout=files", "data.images=[{file: '{case}.nii', intensity: [0, 1e3]}]"]
    settings = load_training_settings("wdm-unet-128", overrides)
    assert (settings.out, settings.optimiser.warmup_steps, settings.optimiser.lr) == (Path("2024-01-15"), 10, 4e-5)
    assert settings.data.images is not None
    assert settings.data.images[0].intensity == [0, 1000]
