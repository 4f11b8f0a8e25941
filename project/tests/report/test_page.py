"""The report, as a browser without a network opens it."""

import base64
import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from support import TINY, link_case
from typer.testing import CliRunner, Result

from cwdm import checkpoint
from cwdm.checkpoint import Record, load_published
from cwdm.cli.app import app
from cwdm.errors import InputError, NameInUseError
from cwdm.images import find_cases, read_grid, write_nifti
from cwdm.report import write_report
from cwdm.report.data import ReportPaths, read_records, read_volumes
from cwdm.weights.untrained import untrained_state

from .report_cases import add_case

HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}\u202e"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI"),
    reason="chromium and chromium-driver are not installed",
)


def cwdm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    """A run over four cases of two samples: hostile names, one turned, one that fails."""
    folder = tmp_path_factory.mktemp("report")
    sources = sorted(phantoms.iterdir())
    for source, missing, name in zip(sources, ("t1n", "t2f", "t1n"), (None, None, HOSTILE), strict=True):
        link_case(source, folder / "input", missing, name)
    link_case(sources[0], folder / "input", "none", "complete")
    link_case(sources[2], folder / "truth", "none", HOSTILE)
    for source in sources[:2]:
        link_case(source, folder / "truth", "none")
    weights = folder / "weights"
    weights.mkdir()
    record = Record(notice="</script><script>alert(2)</script>")
    for modality in ("t1n", "t2f"):
        checkpoint.save(weights / f"{modality}.safetensors", load_published(untrained_state(TINY)), record)
    places = ("--data_path", folder / "input", "--output_path", folder / "output", "--report_path", folder / "report")
    result = cwdm("infer", *places, "--weights", weights, "--device", "cpu", "samples=2", "sampler.timesteps=[1, 0]")
    assert result.exit_code == 1, result.output
    assert f"look at {folder / 'report' / 'report.html'}" in result.output.replace("\n", "")
    return ReportPaths(folder / "report", truth=folder / "truth")


@pytest.fixture(scope="module")
def page(run: ReportPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the run with the truth and a viewer."""
    return write_report(run, [HOSTILE], path=tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and DRIVER):
        pytest.fail("CI needs chromium and chromium-driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def requests(browser: webdriver.Chrome) -> list[str]:
    """What was asked for beside the page and what it holds; the browser's own first tab is part of the browser."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:", "file:", "chrome:"))]


def column(browser: webdriver.Chrome, index: int) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, f"#overview tbody td:nth-child({index})")]


def settled(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a browser logs, without what it says of its own drawing by software."""
    return [entry for entry in log if "GPU stall" not in entry["message"]]


@needs_chromium
def test_it_opens_from_disk_shows_sorts_and_scrolls_and_asks_no_one(
    run: ReportPaths, page: Path, browser: webdriver.Chrome
) -> None:
    browser.get(page.as_uri())
    pictures = browser.find_elements(By.TAG_NAME, "img")
    assert len(pictures) == 3 * (1 + 3 * 7)  # a thumbnail and, in three planes, six images and the spread
    # What the browser has not come to yet is decoded first.
    assert browser.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.images].map(i => i.decode())).then(() => "
        "done([...document.images].every(i => i.naturalWidth > 0)), () => done(false));"
    )
    check, case = 2, 3
    assert column(browser, check)[0] == "failed"
    assert "complete" in column(browser, case)[0]
    heading = browser.find_element(By.XPATH, "//th/button[.='Case']")
    heading.click()
    names = column(browser, case)
    assert names == sorted(names, key=str.lower)
    assert names != column(browser, check)
    heading.click()
    assert column(browser, case) == names[::-1]
    browser.find_element(By.XPATH, "//th/button[.='PSNR, dB']").click()
    assert column(browser, 6)[-1] == "–"
    assert column(browser, 6)[:3] == sorted(column(browser, 6)[:3], key=float)

    viewer = browser.find_element(By.CLASS_NAME, "viewer")
    browser.execute_script("arguments[0].scrollIntoView()", viewer)
    viewer.find_element(By.CLASS_NAME, "open").click()
    WebDriverWait(browser, 60).until(lambda _: viewer.get_attribute("data-ready"))
    canvas = viewer.find_element(By.TAG_NAME, "canvas")
    entry = next(entry for entry in read_records(run.report).entries if entry.case == HOSTILE)
    shown = read_volumes(entry, run)
    assert shown.tumour is not None
    assert shown.tumour[shown.centre]
    assert viewer.get_attribute("data-slice") == str(shown.centre[2])
    cross_mm = [float(number) for number in (viewer.get_attribute("data-cross") or "").split()]
    np.testing.assert_allclose(cross_mm, np.array(shown.centre) * shown.spacing_mm * (-1, -1, 1), atol=0.51)
    full = canvas.screenshot_as_png
    browser.execute_script(
        "arguments[0].value = 60; arguments[0].dispatchEvent(new Event('input'))",
        viewer.find_element(By.CLASS_NAME, "window"),
    )
    assert canvas.screenshot_as_png != full
    assert float((viewer.get_attribute("data-window") or "").split()[0]) < 0.3
    viewer.find_element(By.CLASS_NAME, "reset").click()
    assert canvas.screenshot_as_png == full
    before, slice_before = canvas.screenshot_as_png, int(viewer.get_attribute("data-slice") or -1)
    browser.execute_script(
        "arguments[0].value = 3; arguments[0].dispatchEvent(new Event('input'))",
        viewer.find_element(By.CLASS_NAME, "slice"),
    )
    assert int(viewer.get_attribute("data-slice") or -1) == 3 != slice_before
    after = canvas.screenshot_as_png
    assert after != before
    overlay = viewer.find_element(By.CLASS_NAME, "overlay")
    overlay.find_element(By.XPATH, "option[.='difference']").click()
    WebDriverWait(browser, 10).until(lambda _: canvas.screenshot_as_png != after)
    ActionChains(browser).move_to_element_with_offset(canvas, -200, 0).scroll_by_amount(0, 200).perform()
    assert not viewer.find_element(By.CLASS_NAME, "problem").is_displayed()
    assert settled(browser.get_log("browser")) == []
    assert requests(browser) == []


@needs_chromium
def test_rows_and_sections_are_found_by_words_verdict_and_modality(page: Path, browser: webdriver.Chrome) -> None:
    browser.get(page.as_uri())

    def shown() -> tuple[int, int]:
        rows = browser.find_elements(By.CSS_SELECTOR, "#overview tbody tr")
        sections = browser.find_elements(By.CLASS_NAME, "case")
        return sum(row.is_displayed() for row in rows), sum(section.is_displayed() for section in sections)

    assert shown() == (4, 3)
    search = browser.find_element(By.ID, "search")
    search.send_keys("PHANTOM 00001")
    assert shown() == (1, 1)
    assert browser.find_element(By.ID, "found").text == "1 of 4"
    search.send_keys(Keys.BACKSPACE * 20)
    failed = browser.find_element(By.CSS_SELECTOR, "#tools [data-verdict=failed]")
    failed.click()
    assert shown() == (1, 0)
    failed.click()
    browser.find_element(By.XPATH, "//select[@id='modality']/option[.='t1n']").click()
    assert shown() == (2, 2)


@needs_chromium
def test_on_a_telephone_nothing_is_wider_than_the_screen(page: Path, browser: webdriver.Chrome) -> None:
    telephone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", telephone)
    browser.get(page.as_uri())
    for section in browser.find_elements(By.CLASS_NAME, "case"):
        browser.execute_script("arguments[0].scrollIntoView()", section)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    sides = [tile.rect for tile in browser.find_elements(By.CSS_SELECTOR, ".views .tile")]
    assert max(rect["x"] + rect["width"] for rect in sides) <= 390
    assert min(rect["width"] for rect in sides) > 60
    browser.find_element(By.XPATH, "//select[@id='order']/option[.='Case ↓']").click()  # its headings are not there
    names = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#overview .name")]
    assert names == sorted(names, key=str.lower, reverse=True)


@needs_chromium
def test_a_slice_is_enlarged_with_its_case_its_sides_and_the_outline(page: Path, browser: webdriver.Chrome) -> None:
    browser.get(page.as_uri())
    section = next(s for s in browser.find_elements(By.CLASS_NAME, "case") if "00001" in s.get_attribute("outerHTML"))
    browser.execute_script("arguments[0].scrollIntoView()", section)
    tile = section.find_element(By.CSS_SELECTOR, ".tile")
    small = tile.size["width"]
    assert tile.find_element(By.TAG_NAME, "img").accessible_name == "BraTS-PHANTOM-00001-000: t1n, axial"
    assert tile.find_element(By.CLASS_NAME, "outline").is_displayed()
    tile.click()
    dialog = browser.find_element(By.ID, "enlarged")
    large = dialog.find_element(By.CLASS_NAME, "tile")
    assert large.size["width"] > 3 * small
    assert (large.get_attribute("data-left"), large.get_attribute("data-right")) == ("R", "L")
    assert large.find_element(By.CLASS_NAME, "outline").size["width"] > 3 * small
    assert dialog.find_element(By.CLASS_NAME, "caption").text == "BraTS-PHANTOM-00001-000: t1n, axial"
    steps = {Keys.ARROW_RIGHT: "t1c, axial", Keys.ARROW_DOWN: "t1c, coronal", Keys.ARROW_LEFT: "t1n, coronal"}
    for key, caption in steps.items():
        ActionChains(browser).send_keys(key).perform()
        assert dialog.find_element(By.CLASS_NAME, "caption").text == f"BraTS-PHANTOM-00001-000: {caption}"
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    browser.find_element(By.ID, "outlines").click()
    assert not tile.find_element(By.CLASS_NAME, "outline").is_displayed()
    assert section.find_element(By.CLASS_NAME, "bar").text.split() == ["0", "0.5"]
    assert settled(browser.get_log("browser")) == []


@needs_chromium
def test_two_cases_are_printed_a_page(phantoms: Path, browser: webdriver.Chrome, tmp_path: Path) -> None:
    source = phantoms / "BraTS-PHANTOM-00000-000"

    def pages(cases: int) -> int:
        for name in range(cases):
            paths = add_case(tmp_path / str(cases), source, f"case-{name}", verdict="look")
        browser.get(write_report(replace(paths, truth=None)).as_uri())  # without a truth the slices are the largest
        printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
        return len(re.findall(rb"/Type */Page\b", base64.b64decode(printed["data"])))

    assert pages(10) - pages(2) <= 4


@needs_chromium
def test_names_and_messages_do_nothing(page: Path, browser: webdriver.Chrome) -> None:
    browser.get(page.as_uri())
    shown = browser.find_element(By.TAG_NAME, "body").text
    assert "<img src=x onerror=alert(1)>\"'&{{7*7}}\\u202e" in shown
    assert "</script><script>alert(2)</script>" in shown
    assert settled(browser.get_log("browser")) == []  # an alert would have raised, a blocked script would be logged


def test_the_file_holds_all_it_needs(page: Path) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert "\u202e" not in text
    head = text[: text.index("<table")]
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", head)
    assert "default-src 'none'" in head
    assert "NiiVue 0.69.0" in text
    plain = text[: text.index("</main>")]
    for told in ("How it was made", "samples</dt><dd>2", "sampler.timesteps</dt><dd>[1, 0]"):
        assert told in plain
    assert re.search(r"<code>[0-9a-f]{64}</code>", plain)


def test_without_a_viewer_it_is_small_and_says_what_it_leaves_out(run: ReportPaths, tmp_path: Path) -> None:
    everything = write_report(run, path=tmp_path / "all.html")
    assert everything.stat().st_size < 400_000
    record = {"case": "plain", "modality": "t1n", "status": "written"}
    shutil.copytree(run.report, tmp_path / "report")
    (tmp_path / "report" / "plain-t1n.json").write_text(json.dumps(record))
    few = write_report(replace(run, report=tmp_path / "report"), most=0, path=tmp_path / "few.html").read_text()
    assert "only the worst are pictured, 3 in all" in few  # those that are marked
    assert few.count('class="case"') == 3


def test_the_same_slice_of_the_same_head_whatever_order_it_is_stored_in(run: ReportPaths, tmp_path: Path) -> None:
    entry = next(entry for entry in read_records(run.report).entries if entry.case.endswith("00001-000"))
    straight = read_volumes(entry, run)
    assert entry.record
    turned = tmp_path / "in" / entry.case
    turned.mkdir(parents=True)
    for path in [*Path(entry.record.input).iterdir(), Path(entry.record.output)]:
        volume, affine, _ = read_grid(path)
        back = affine.copy()
        back[:3, 2] *= -1
        back[:3, 3] += affine[:3, 2] * (volume.shape[2] - 1)
        folder = turned if path != Path(entry.record.output) else tmp_path / "out"
        folder.mkdir(exist_ok=True)
        write_nifti(folder / path.name, volume[:, :, ::-1], back)
    other = read_volumes(entry, ReportPaths(tmp_path, data=tmp_path / "in", output=tmp_path / "out"))
    np.testing.assert_allclose(other.synthesis, straight.synthesis, atol=1e-6)
    for name, volume in straight.conditions.items():
        np.testing.assert_allclose(other.conditions[name], volume, atol=1e-6)
    assert straight.truth is not None
    assert other.truth is other.std is None


def test_a_true_image_on_another_grid_or_missing_is_named(run: ReportPaths, tmp_path: Path) -> None:
    assert run.truth is not None
    for source in run.truth.iterdir():
        link_case(source, tmp_path / "truth", "none")
    turned, missing = sorted((tmp_path / "truth").glob("BraTS*"))
    for path in turned.iterdir():
        volume, affine, _ = read_grid(path)
        path.unlink()
        write_nifti(path, volume, affine @ np.diag([-1, 1, 1, 1]))
    shutil.rmtree(missing)
    text = write_report(replace(run, truth=tmp_path / "truth"), path=tmp_path / "report.html").read_text()
    assert text.count("mm apart (affines differ)") >= 1
    assert text.count("its true image is not in") >= 1
    with pytest.raises(InputError, match="true images does not exist"):
        write_report(replace(run, truth=tmp_path / "none"))


def test_no_folder_of_this_machine_stands_in_it(run: ReportPaths, tmp_path: Path) -> None:
    report = tmp_path / "a folder" / "report"
    shutil.copytree(run.report, report)
    hidden = ["/srv/my hospital/in/one/one-t2w.nii.gz: is damaged", "not in /data; see /home/me/x.nii"]
    failed = {"modality": "", "status": "failed"}
    outcomes = [{**failed, "case": f"{i}", "reason": reason} for i, reason in enumerate(hidden)]
    record = {"case": "one", "modality": "t1n", "status": "written", "input": "/srv/my hospital/in/one"}
    (report / "one-t1n.json").write_text(json.dumps(record))
    (report / "run-20290101T000000.0-1.json").write_text(json.dumps({"started": "2029", "cases": outcomes}))
    for paths in (replace(run, report=report), ReportPaths(report, data=tmp_path, truth=report.parent)):
        text = html.unescape(write_report(paths, path=tmp_path / "page.html").read_text())
        for folder in ("/srv", "my hospital", "/home", " /data", str(tmp_path), str(run.report.parent), "a folder/"):
            assert folder not in text
        assert "…/one/one-t2w.nii.gz: is damaged" in text
        assert "not in …/data; see …/x.nii" in text


def test_only_a_report_is_replaced(run: ReportPaths, tmp_path: Path) -> None:
    own = tmp_path / "notes.html"
    own.write_text("<html><head><title>my notes</title></head></html>")
    with pytest.raises(InputError, match=r"notes\.html is there and is no report of cwdm"):
        write_report(run, path=own)
    assert "my notes" in own.read_text()
    page = write_report(run, most=0, path=tmp_path / "page.html")
    first = page.read_bytes()
    assert write_report(replace(run, truth=None), most=0, path=page).read_bytes() != first
    (tmp_path / "folder").mkdir()
    with pytest.raises(NameInUseError, match="a folder has that name"):
        write_report(run, most=0, path=tmp_path / "folder")


def test_a_case_that_cannot_be_pictured_is_listed_with_the_reason(run: ReportPaths, tmp_path: Path) -> None:
    text = write_report(replace(run, data=tmp_path), path=tmp_path / "report.html").read_text()
    assert text.count("not pictured: its input is not at") >= 3
    assert "give --data_path" in text


def test_the_last_run_over_a_case_counts(tmp_path: Path) -> None:
    def write(name: str, **content: Any) -> None:
        (tmp_path / name).write_text(json.dumps(content))

    def outcome(status: str, **more: Any) -> dict[str, Any]:
        return {"case": "a", "modality": "t1n", "status": status, **more}

    quality = {"verdict": "look", "reasons": ["noisy"], "figures": {}}
    write("run-20260102T000000.0-1.json", started="2026-01-02", cases=[outcome("written", quality=quality)])
    failed = {"case": "a", "modality": "", "status": "failed"}
    write("run-20260101T000000.0-1.json", started="2026-01-01", cases=[failed])
    write("a-t1n.json", **outcome("written", quality=quality, warnings=["w"]))
    (entry,) = read_records(tmp_path).entries
    assert (entry.verdict, entry.warnings) == ("look", ("w",))
    skipped = outcome("skipped", warnings=["made with other settings"])
    write("run-20260103T000000.0-1.json", started="2026-01-03", cases=[skipped])
    (entry,) = read_records(tmp_path).entries
    assert (entry.verdict, entry.warnings) == ("look", ("w", "made with other settings"))
    write("run-20260104T000000.0-1.json", started="2026-01-04", cases=[outcome("failed", reason="not enough memory")])
    (entry,) = read_records(tmp_path).entries
    assert (entry.verdict, entry.reason) == ("failed", "not enough memory")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"case": "../../etc", "modality": "t1n", "status": "written"}', '{"case": "a"}', "\udc80"]
)
def test_a_damaged_record_is_named_and_the_others_stand(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"no record found.*bad\.json"):
        read_records(tmp_path)
    (tmp_path / "good-t1n.json").write_text('{"case": "good", "modality": "t1n", "status": "written"}')
    records = read_records(tmp_path)
    assert [entry.case for entry in records.entries] == ["good"]
    assert "bad.json" in records.faults[0]
    text = write_report(ReportPaths(tmp_path)).read_text()
    assert "bad.json" in text
    assert "1 case, not checked" in text


def test_wrong_arguments_are_one_clear_message(run: ReportPaths, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "none")
    with pytest.raises(InputError, match="no record of nobody"):
        write_report(run, ["nobody"])


def test_command(run: ReportPaths, tmp_path: Path) -> None:
    result = cwdm("report", run.report, "--truth", run.truth, "--cases", 1, "--out", tmp_path / "x.html")
    assert result.exit_code == 0, result.output
    assert "look at" in result.output
    assert (tmp_path / "x.html").stat().st_size > 10_000
    assert len(find_cases(run.report.parent / "input")) == 4
