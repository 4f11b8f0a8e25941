"""The documentation: every code block of its pages runs on small data, and every link leads somewhere.

The blocks of a page run from top to bottom in one folder of its own, which holds what its readers have: complete cases
(`BRATS`, `HELD_OUT`, `complete`), the same without one modality each (`input`), small untrained weights (`weights`),
a patient's raw scans (`scans`), pairs of images (`pairs`, `new_pairs`), a segmenter (`segment.py`) and the repository's
`project` and `workspace`.

- `sh`: a line a command; `cwdm` and scripts of Python run in this process, which has imported PyTorch already, and
  `cwdm train` gets settings of a small run behind its own.
- `python`: runs; later blocks see the names of earlier ones.
- A block with a title, such as ```` ```yaml title="ct.yaml" ````, is written to a file of that name instead.
- `text`: neither.

`<!-- not run: REASON -->` in front of a block leaves it out; it is listed as skipped, with the reason.
"""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from raw_scans import write_head
from support import TINY

from cwdm.checkpoint import Record
from cwdm.diffusion import SCHEDULES
from cwdm.phantoms import write_phantoms
from cwdm.prepare import drop_modalities
from cwdm.samplers import SAMPLERS
from cwdm.weights import write_untrained

ROOT = Path(__file__).resolve().parents[2]
CARD = ROOT / "project" / "cwdm" / "weights" / "bundled" / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mlcube/README.md")),
    CARD,
    *sorted((ROOT / "docs").rglob("*.md")),
]

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"```(?P<language>\S*)(?: title=\"(?P<file>[^\"\n]+)\")?[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")

DROPS_T2F_FIRST = 6

SMALL_RUN = (
    "data.workers=0",
    "network.model_channels=16",
    "network.channel_mult=[1,1]",
    "network.groups=8",
    "network.num_res_blocks=1",
    "data.window=[32,32,24]",
    "data.crop=null",
    "steps=2",
    "save_every=null",
    "device=cpu",
    "devices=1",
    "optimiser.batch_size=1",
)

SEGMENTER = """\
import sys
from pathlib import Path
import nibabel as nib
import numpy as np
case, output = Path(sys.argv[1]), Path(sys.argv[2])
image = nib.load(next(case.glob("*t1c*")))
bright = image.get_fdata() > np.percentile(image.get_fdata(), 97)
nib.save(nib.Nifti1Image(3 * bright.astype(np.uint8), image.affine), output)
"""


@dataclass(frozen=True)
class Block:
    """A block of code with the number of its first line."""

    language: str
    code: str
    line: int
    file: str = ""
    reason: str = ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["language"],
            match["code"],
            text.count("\n", 0, match.start("code")) + 1,
            match["file"] or "",
            match["reason"] or "",
        )
        for match in BLOCK.finditer(text)
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


NOT_RUN = [
    pytest.param(block.reason, id=f"{name(page)}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.reason
]


@pytest.mark.parametrize("reason", NOT_RUN)
def test_block_that_cannot_be_run_here(reason: str) -> None:
    pytest.skip(reason)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_blocks_run(page: Path, desk: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason or block.language == "text":
            continue
        if block.file:
            (desk / block.file).parent.mkdir(parents=True, exist_ok=True)
            (desk / block.file).write_text(block.code)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
        else:
            assert block.language == "sh", f"{name(page)}:{block.line}: neither sh, python, text nor a titled file"
            for command in commands(block.code):
                run(command, f"{name(page)}:{block.line}: {command}", desk)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "extend" / "sampler" / "index.html").is_file()


def commands(code: str) -> Iterator[str]:
    """The commands of a block, a line of it being one or several joined by &&."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.join(shlex.split(line, comments=True)) and re.sub(r"\s+#.*", "", line).strip()
        if words and not words.startswith("#"):
            yield from re.split(r"\s*&&\s*", words)


def run(command: str, where: str, folder: Path) -> None:
    words = shlex.split(command)
    if words[0] == "python":
        run_here(lambda: run_script(folder / words[1]), words[1:], where)
        return
    if words[0] != "cwdm":
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
        return
    if words[1:2] == ["train"]:
        options = [word for word in words if word.startswith("-")]
        words = [word for word in words if word not in options] + [*SMALL_RUN, *options]
    (main,) = entry_points(group="console_scripts", name="cwdm")
    run_here(main.load(), words, where)


def run_here(program: Callable[[], object], words: list[str], where: str) -> None:
    """A program with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            program()
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
    assert not code, f"{where}\nended with {code}"


def run_script(path: Path) -> None:
    """A script, which finds the modules beside it and leaves none of them behind."""
    before, folder = set(sys.modules), path.resolve().parent
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            for name in set(sys.modules) - before:
                if Path(getattr(sys.modules[name], "__file__", None) or ".").parent == folder:
                    del sys.modules[name]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases, pairs and weights, made once; not to be written to."""
    folder = tmp_path_factory.mktemp("docs")
    for number, case in enumerate(write_phantoms(folder / "made", 2, seed=4, shape=(31, 32, 25), spacing_mm=6.5), 1):
        images = {path.name.removeprefix(f"{case.name}-"): path for path in case.iterdir()}
        own = f"BraTS-GLI-{number:05d}-000"
        (folder / "BRATS" / own).mkdir(parents=True)
        for ending, path in images.items():
            shutil.copy(path, folder / "BRATS" / own / f"{own}-{ending}")
        write_pair(folder / "pairs" / own, images)
    for number, (modality, scan) in enumerate({"t1n": "t1", "t2w": "t2", "t2f": "flair"}.items()):
        write_head(folder / "scans" / "patient-1" / f"{scan}.nii.gz", modality, number)
    # The window of the record keeps the box small, the sampler the steps few.
    write_untrained(folder / "weights", TINY, Record(window="brain", sampler="ddim", steps=2))
    return folder


def write_pair(folder: Path, images: dict[str, Path]) -> None:
    """A pair as of CT and MR, and a map of labels."""
    folder.mkdir(parents=True)
    like, seg = nib.load(images["t1c.nii.gz"]), nib.load(images["seg.nii.gz"])
    head = like.get_fdata()
    hounsfield = (2000 * head / head.max() - 1000).astype(np.int16)
    for file, array in (("ct", hounsfield), ("mr", nib.load(images["t1n.nii.gz"]).get_fdata().astype(np.int16))):
        nib.save(nib.Nifti1Image(array, like.affine), folder / f"{file}.nii.gz")
    nib.save(nib.Nifti1Image((head > 0).astype(np.uint8), like.affine), folder / "mask.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(seg.dataobj).astype(np.uint8), like.affine), folder / "organs.nii.gz")


@pytest.fixture
def desk(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a page's blocks run in."""
    for source, copies in (("BRATS", ("BRATS", "HELD_OUT", "complete")), ("pairs", ("pairs", "new_pairs"))):
        for copy in copies:
            shutil.copytree(data / source, tmp_path / copy)
    drop_modalities(tmp_path / "complete", tmp_path / "input", seed=DROPS_T2F_FIRST)
    shutil.copytree(data / "weights", tmp_path / "weights")
    (tmp_path / "scans").symlink_to(data / "scans")
    shutil.copytree(ROOT / "workspace", tmp_path / "workspace")
    (tmp_path / "project").symlink_to(ROOT / "project")
    (tmp_path / "segment.py").write_text(SEGMENTER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CWDM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    registries = [(registry, dict(registry)) for registry in (SCHEDULES, SAMPLERS)]
    yield tmp_path
    for registry, before in registries:  # a page may add one of its own
        registry.clear()
        registry.update(before)
