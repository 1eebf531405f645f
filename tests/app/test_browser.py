"""
The page in a real browser, Debian's Chromium.

`make screenshots` runs two of these tests on whisper-base, the demo's expert and Romanian recordings, and writes the
pictures of the docs.
"""

import base64
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import noise

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

from peft_clsr import read_audio

CHROMIUM = shutil.which("chromium")
# Set by `make screenshots`: where to write the pictures, and the model, the expert and the recordings to show.
PICTURES = os.environ.get("PEFT_CLSR_PICTURES")
SHOWN = os.environ.get("PEFT_CLSR_SHOWN", "").split(os.pathsep)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
expect.set_options(timeout=600_000 if PICTURES else 60_000)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for name, seconds in (("short.wav", 0.8), ("long.mp3", 8), ("example.flac", 1.7), ("voice.wav", 3)):
        soundfile.write(folder / name, noise(seconds), 16000)
    (folder / "broken.wav").write_text("no sound")
    (folder / "notes.txt").write_text("no sound")
    texts = {"example.flac": "Bon dia"}
    language = "ca"
    if PICTURES:
        texts = joined_recordings(Path(SHOWN[2]), folder)
        language = "ro"
    rows = [f'{name},"{text}",{language}' for name, text in texts.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,transcription,language", *rows]) + "\n")
    return folder


def joined_recordings(split, folder):
    """Write three recordings, each of some of a split's with pauses between them. Returns their texts by name."""
    with open(split / "metadata.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["transcription"][-1] in ".!?"]
    texts = {}
    for number, name in enumerate(("example.flac", "second.flac", "third.flac")):
        own = rows[5 * number : 5 * number + 5]
        parts = [read_audio(str(split / row["file_name"]), 16000) for row in own]
        pause = np.zeros(6400, dtype=np.float32)
        soundfile.write(folder / name, np.concatenate([sound for part in parts for sound in (part, pause)]), 16000)
        texts[name] = " ".join(row["transcription"].replace('"', "") for row in own)
    return texts


@pytest.fixture(scope="module")
def app(models, recordings, tmp_path_factory):
    """The address of the page, and the folder of the temporary files of its process."""
    folder = tmp_path_factory.mktemp("temporary")
    model, adapters = SHOWN[:2] if PICTURES else (str(models / "tiny"), str(models / "experts"))
    command = [sys.executable, "-m", "peft_clsr", "app", "--model", model, "--adapters", adapters]
    command += ["--examples", str(recordings / "metadata.csv")]
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("the page is at http://127.0.0.1:"), line
    yield line.split()[-1], folder
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert not list(folder.glob("peft-clsr-app-*"))


@pytest.fixture(scope="module")
def browser(recordings):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={recordings / 'voice.wav'}",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def page(app, browser):
    """The page, in a session of its own. It may ask nobody but the server, and no script may fail."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, permissions=["microphone"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    others, errors = [], []
    page.on("request", lambda request: others.append(request.url) if is_elsewhere(request.url, app[0]) else None)
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(app[0])
    expect(page.locator("#start")).to_be_visible()
    yield page
    context.close()
    assert others == [] and errors == []


def is_elsewhere(url, address):
    return not url.startswith((address, "data:", "blob:"))


def choose(page, language):
    box = page.locator("#language input")
    box.click()
    box.fill(language)
    page.get_by_role("option", name=re.compile(f"^{language}")).first.click()


def upload(page, path):
    page.locator("#audio input[type=file]").set_input_files(path)


def uploads(folder):
    return [path for path in folder.rglob("*") if path.is_file() and "peft-clsr-app-" in str(path)]


def picture(page, name):
    if PICTURES:
        page.screenshot(path=Path(PICTURES, f"{name}.png"), full_page=True, animations="disabled")


def test_an_upload_is_transcribed_and_does_not_stay_on_the_disk(page, app, recordings):
    upload(page, recordings / "short.wav")
    expect(page.locator("#about")).to_contain_text("short.wav, 0.8 s")
    assert uploads(app[1]) == []
    choose(page, "Catalan")
    page.locator("#reference textarea").fill("bon dia")
    page.locator("#start").click()
    expect(page.locator("#base")).to_contain_text("Base model · WER")
    expect(page.locator("#expert")).to_contain_text("With the expert · WER")
    assert page.locator("#expert span[title$='%']").count() > 0
    bars = page.locator("#wave rect").evaluate_all("bars => new Set(bars.map(bar => bar.getAttribute('fill'))).size")
    assert bars > 1
    link = page.locator("#srt a")
    assert link.get_attribute("download") == "short.srt"
    assert base64.b64decode(link.get_attribute("href").split(",")[1]).startswith(b"1\n00:00:00,")
    assert uploads(app[1]) == []
    # The recording is still there for another language.
    choose(page, "French")
    page.locator("#start").click()
    expect(page.locator("#legend")).to_contain_text("no expert for this language")


def test_the_microphone_is_heard(page, app):
    page.locator("#audio button[aria-label='Record audio']").click()
    page.locator("#audio .record-button").click()
    time.sleep(1.5)
    page.locator("#audio .stop-button").click()
    expect(page.locator("#about")).to_contain_text(re.compile(r"[1-9]\.\d s"))
    page.locator("#start").click()
    expect(page.locator("#base h3")).to_contain_text("Base model")
    assert uploads(app[1]) == []


@pytest.mark.parametrize(("name", "message"), [("broken.wav", "broken.wav"), ("notes.txt", "")])
def test_a_wrong_file_has_a_clear_message(page, app, recordings, name, message):
    upload(page, recordings / name)
    expect(page.get_by_test_id("toast-body").first).to_contain_text(message or re.compile("Invalid file type"))
    assert uploads(app[1]) == []
    page.get_by_test_id("toast-close").first.click()
    page.locator("#start").click()
    expect(page.get_by_test_id("toast-body").first).to_contain_text("there is no recording yet")


def test_a_long_file_shows_its_progress(page, recordings):
    upload(page, recordings / "long.mp3")
    expect(page.locator("#about")).to_contain_text("long.mp3, 8.0 s")
    choose(page, "Romanian")
    # The progress is gone when the transcript is there, so every text of it is noted.
    page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
            for (const found of document.body.innerText.matchAll(/(Base model|Expert|Gates): (\\d+) of 8 s/g))
                window.seen.add(found[0]);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }"""
    )
    page.locator("#start").click()
    expect(page.locator("#expert h3")).to_contain_text("With the expert")
    seen = page.evaluate("[...window.seen]")
    assert len(seen) > 2 and any(not text.startswith("Base model: 0") for text in seen), seen


@pytest.fixture
def example(page, recordings):
    """The example is chosen. Its language and text."""
    with open(recordings / "metadata.csv", newline="") as file:
        row = next(csv.DictReader(file))
    page.locator("#examples").get_by_text("example.flac").click()
    expect(page.locator("#about")).to_contain_text("example.flac")
    expect(page.locator("#reference textarea")).to_have_value(row["transcription"])
    return row


def test_an_example_brings_its_language_and_text(page, example):
    page.locator("#start").click()
    expect(page.locator("#expert h3")).to_contain_text("WER")
    expect(page.locator("#about")).to_contain_text({"ca": "Catalan", "ro": "Romanian"}[example["language"]])
    assert page.locator("#base mark").count() > 0 and page.locator("#expert mark").count() > 0
    picture(page, "app")


def test_a_narrow_screen_needs_no_scrolling_sideways(page, example):
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#start").click()
    expect(page.locator("#expert h3")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sides = [page.locator(side).bounding_box() for side in ("#base", "#expert")]
    assert sides[0]["y"] + sides[0]["height"] <= sides[1]["y"]  # one below the other
    picture(page, "app-narrow")
