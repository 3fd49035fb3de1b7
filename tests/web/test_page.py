"""The page in a real browser, over the fake backend: no test waits for a network, and several hold one."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from svd_engine.engine import VideoEngine
from svd_engine.serving.one_video import Status
from svd_engine.serving.web.server import MAX_UPLOAD_BYTES, WebServer
from tests.engine.watching import PATIENCE, Gate, WatchedBackend, fake_engine
from tests.examples.debian import NotHere
from tests.support.paths import PHOTOGRAPH
from tests.web.chromium import chromium

QUEUE = 1
MS = PATIENCE * 1000
PLAYS = "() => document.querySelector('#video video')?.readyState === 4"


@dataclass
class Site:
    server: WebServer
    backend: WatchedBackend
    browser: Browser
    context: BrowserContext  # of visitors on one kind of screen: they share what was loaded
    elsewhere: list[str]  # what pages asked of other hosts

    def hold(self, network: str, run: int = 1) -> Gate:
        """Holds the `run`th run of a network from now on, until it is opened."""
        gate, seen = Gate(), []

        def ran(name: str) -> None:
            if name == network:
                seen.append(name)
                if len(seen) == run:
                    gate()

        self.backend.ran = ran
        return gate

    def ended(self) -> dict[Status, int]:
        return self.server.service.outcomes


@pytest.fixture(scope="module")
def site(tiny_checkpoint: Path) -> Iterator[Site]:
    try:
        found = chromium()
    except NotHere as error:
        message = f"Chromium cannot be had here: {error}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    engine, backend = fake_engine()
    other = VideoEngine.from_checkpoint(str(tiny_checkpoint), backend="eager", device="cpu")
    server = WebServer({"fake": engine, "tiny": other}, port=0, max_queue=QUEUE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found.program, env=found.environment or None, args=["--no-sandbox"]
        )
        yield Site(server, backend, browser, browser.new_context(), [])
        browser.close()
    server.close()


@pytest.fixture
def visit(site: Site) -> Iterator[Any]:
    """Opens pages, each as a visitor of its own."""
    opened = []

    def visit(**options: Any) -> Page:
        page = site.browser.new_page(**options) if options else site.context.new_page()
        page.set_default_timeout(MS)
        page.on("request", lambda r: None if _is_here(r.url, site) else site.elsewhere.append(r.url))
        page.goto(site.server.url)
        opened.append(page)
        return page

    yield visit
    site.backend.ran = lambda network: None
    for page in opened:
        page.close()


def _is_here(url: str, site: Site) -> bool:
    return url.startswith((site.server.url, "data:", "blob:"))


def upload(page: Page, name: str = "coffee.png", content: bytes | None = None) -> None:
    content = PHOTOGRAPH.read_bytes() if content is None else content
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("#photograph input[type=file]").set_input_files(file)
    expect(page.get_by_label("Remove Image")).to_be_visible(timeout=MS)


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def field(page: Page, name: str) -> Locator:
    """Of a parameter; of a slider its number."""
    return page.locator(f"#{name}").locator("input, textarea").first


def says(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=MS)


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_from_a_photograph_to_a_video_that_plays(site: Site, visit: Any, tmp_path: Path) -> None:
    page = visit()
    upload(page)
    gate = site.hold("denoiser", run=4)
    press(page, "Generate")
    says(page, "Denoising, step 3 of 25")
    expect(page.locator("#status img")).to_have_attribute("src", re.compile("^data:image/webp"))
    assert page.locator("#status progress").evaluate("bar => bar.value / bar.max") == 3 / 25
    gate.opened.set()
    page.wait_for_function(PLAYS)
    says(page, "Done in")
    assert page.locator("#video video").evaluate("v => [v.videoWidth, v.videoHeight]") == [128, 64]
    files = {}
    for kind in ("mp4", "webp", "gif", "zip"):
        with page.expect_download() as download:
            page.locator(f"#download-{kind}:not([disabled])").click()
        assert download.value.suggested_filename == f"fake-seed-0.{kind}"
        files[kind] = Path(download.value.path()).read_bytes()
    assert len(zipfile.ZipFile(io.BytesIO(files["zip"])).namelist()) == 5
    assert Image.open(io.BytesIO(files["webp"])).n_frames == 5
    page.get_by_text("Report: backend").click()
    expect(page.locator("#report")).to_contain_text("total_ms")

    before = site.ended()[Status.DONE]
    press(page, "Again with another seed")
    expect(page.locator("#gallery button.thumbnail-item")).to_have_count(2, timeout=MS)
    assert site.ended()[Status.DONE] == before + 1
    assert field(page, "seed").input_value() != "0"
    assert site.elsewhere == []


def test_the_page_is_the_engine_s_call(site: Site, visit: Any) -> None:
    """Of the model that was chosen, with the settings that were made; its own for the rest."""
    page = visit()
    page.get_by_role("button", name="coffee.png").or_(page.locator(".gallery-item")).first.click()
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny").click()
    says(page, "Your video will be here")
    page.get_by_text("More settings").click()
    expect(field(page, "num_frames")).to_have_value("14", timeout=MS)  # the checkpoint's
    for name, value in {"num_frames": "2", "height": "32", "width": "64", "num_inference_steps": "2"}.items():
        field(page, name).fill(value)
    field(page, "seed").fill(str(2**64 - 1))
    press(page, "Generate")
    page.wait_for_function(PLAYS)
    (taken,) = [v for v in site.server.page.visits.values() if v.videos and "tiny" in v.videos[0][0]]
    report = taken.job.result().report
    assert report.seeds == [2**64 - 1]
    assert (report.settings.steps, report.settings.frames, report.settings.width) == (2, 2, 64)
    alone = site.server.models["tiny"](
        Image.open(PHOTOGRAPH), 32, 64, 2, 2, generator=torch.Generator().manual_seed(2**64 - 1),
        output_type="pt",
    )  # fmt: skip
    assert torch.equal(taken.job.result().frames, alone.frames)


def test_the_second_waits_the_fourth_is_refused_and_cancelling_frees(site: Site, visit: Any) -> None:
    first, second, third = visit(), visit(), visit()
    for page in (first, second, third):
        upload(page)
    gate = site.hold("denoiser", run=2)
    press(first, "Generate")
    says(first, "step 1 of 25")
    press(second, "Generate")
    says(second, "In the queue, 1 video before yours")
    press(third, "Generate")
    says(third, "Queue of the job service: expected at most 1 waiting")
    before = site.ended()[Status.CANCELLED]
    press(second, "Cancel")
    says(second, "Cancelled.")
    press(first, "Cancel")
    gate.opened.set()
    says(first, "Cancelled.")
    assert site.ended()[Status.CANCELLED] == before + 2
    press(third, "Generate")
    third.wait_for_function(PLAYS)


def test_a_page_that_is_closed_ends_its_job_and_leaves_no_file(site: Site, visit: Any) -> None:
    page, other = visit(), visit()
    upload(page)
    press(page, "Generate")
    page.wait_for_function(PLAYS)
    (left,) = [
        v for v in site.server.page.visits.values() if v.job and v.job.status is Status.DONE and v.videos
    ]
    expect(page.locator("#download-zip:not([disabled])")).to_be_visible(timeout=MS)
    gate = site.hold("denoiser", run=2)
    press(page, "Again with another seed")
    gate.wait()
    page.close()
    upload(other)
    press(other, "Generate")
    gate.opened.set() if left.job._cancelled.wait(PATIENCE) else pytest.fail("not cancelled")
    other.wait_for_function(PLAYS)
    assert left.job.status is Status.CANCELLED
    assert not left.folder.exists()


def test_ten_quick_clicks_are_one_job(site: Site, visit: Any) -> None:
    page = visit()
    upload(page)
    gate = site.hold("denoiser")
    started = sum(site.ended().values())
    for _ in range(10):
        press(page, "Generate")
    gate.wait()
    press(page, "Again with another seed")  # once: a second might come late, when the job has ended
    expect(page.get_by_text("Your visit: expected one video at a time").first).to_be_visible(timeout=MS)
    gate.opened.set()
    page.wait_for_function(PLAYS)
    assert sum(site.ended().values()) == started + 1


def test_what_cannot_be_done_is_said_in_words(
    site: Site, visit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    page = visit()

    def refused(words: str) -> None:
        press(page, "Generate")
        expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible(timeout=MS)

    refused("Photograph: expected one, got none")
    upload(page, content=b"this is no picture")
    refused("Image: expected a whole picture")
    press(page, "Remove Image")
    upload(page, content=png(10_000, 10_000))
    refused("expected at most 64,000,000 pixels and 65,535 a side, got 10000 x 10000")
    press(page, "Remove Image")
    upload(page)
    field(page, "seed").fill("a lucky one")
    refused("Seed: expected a whole number from 0 to 2^64 - 1, got 'a lucky one'")
    field(page, "seed").fill("1")

    def break_down(network: str) -> None:
        raise RuntimeError("secret")

    site.backend.ran = break_down
    refused("The server could not make this video. Its log says why.")
    assert "secret" not in page.locator("body").inner_text()
    assert "secret" in caplog.text
    site.backend.ran = lambda network: None
    press(page, "Generate")
    page.wait_for_function(PLAYS)


def test_on_a_phone_with_the_keyboard_alone(site: Site, visit: Any) -> None:
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True)
    upload(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    names: list[str] = []
    for _ in range(80):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.id"))
        if names[-1] == "generate":
            break
    assert "range slider for Steps" in names
    page.keyboard.press("Enter")
    page.wait_for_function(PLAYS)
    box = page.locator("#video video").bounding_box()
    assert box is not None
    assert box["width"] <= 360


def test_nothing_of_the_machine_is_served(site: Site, visit: Any, tiny_checkpoint: Path) -> None:
    page = visit()
    files = ["/etc/passwd", tiny_checkpoint / "model_index.json", Path(__file__), "../../../../etc/passwd"]
    files += [site.server.page.folder / ".." / "passwd", "http://127.0.0.1:1/"]
    for file in files:
        for way in ("file=", "file/"):
            answer = page.request.get(f"{site.server.url}gradio_api/{way}{file}")
            assert answer.status in (400, 403, 404), (file, answer.status)
    assert site.server.page.blocks.max_file_size == MAX_UPLOAD_BYTES
    upload(page)
    with page.expect_request("**/queue/join*") as joined:
        press(page, "Generate")
    page.wait_for_function(PLAYS)
    body = json.loads(joined.value.post_data)
    body["data"][1]["path"] = "/etc/passwd"
    body["session_hash"] = "another"
    page.request.post(f"{site.server.url}gradio_api/queue/join", data=body)
    told = page.request.get(f"{site.server.url}gradio_api/queue/data?session_hash=another").text()
    assert '"success":false' in told
    assert "root:" not in told
