"""The page at / in a real browser, Debian's Chromium: `make test-page`. PICTURES=FOLDER leaves pictures there."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from rich.console import Console
from rich.text import Text

from magicpig.studies.evaluation.tasks import generate

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 800}
ANSWERED = 60_000  # milliseconds
DOCUMENT = "the cat of rome sat on a map of the sea. " * 60


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium is not None, "apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, live):
    """`open_page(**options of a browser context)`: the page of the server; what goes wrong in it fails the test."""
    contexts, wrong = [], []

    def go(**options):
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda answer: wrong.append(answer.url) if answer.status in (404, 500) else None)
        page.goto(live.url)
        expect(page.locator("#model")).to_contain_text("pocket")
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def drop(page, name, text, kind="text/plain"):
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": text.encode()})


def ask(page, question):
    before = page.locator("#log .answer").count()
    page.fill("#question", question)
    page.keyboard.press("Enter")
    expect(page.locator("#log .answer")).to_have_count(before + 1)
    expect(page.locator("#log .answer[aria-busy]")).to_have_count(0, timeout=ANSWERED)


def go_on(page, tokens):
    """Answers of this many tokens, whatever the model would rather do."""

    def longer(route):
        body = json.loads(route.request.post_data) | {"ignore_eos": True, "max_tokens": tokens}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", longer)


def picture(shown, name):
    if folder := os.environ.get("PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shown.screenshot(path=Path(folder) / f"{name}.png")


def test_a_document_is_dropped_and_asked_about(open_page):
    page = open_page()
    go_on(page, 20)
    page.evaluate(
        """text => {
            const data = new DataTransfer();
            data.items.add(new File([text], "sea.md", {type: "text/markdown"}));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }""",
        DOCUMENT,
    )
    expect(page.locator("#drop")).to_contain_text("sea.md: 2,460 characters")
    page.fill("#budget", "64")
    ask(page, "the cat sat on")
    expect(page.locator("#log .answer")).not_to_have_text("…")
    layers = page.locator("#heat div")
    expect(layers).to_have_count(3)
    assert not any(text.endswith("100 %") for text in layers.all_inner_texts()), "all layers read a sample"
    assert "layer 2" in page.locator("#heat").get_attribute("aria-label")
    for name in ("speed", "first", "error", "read", "full", "kv", "index"):
        assert page.locator(f"#{name}").inner_text() != "–", name
    shown = (page.locator(f"#{name}").inner_text().split() for name in ("read", "full"))
    read, full = (float(number) * {"KiB": 1, "MiB": 1024}[unit] for number, unit in shown)
    assert 0 < read < full
    expect(page.locator("#warm")).to_have_text("0 tokens")
    page.locator("#forget").click()
    drop(page, "sea.md", DOCUMENT)
    ask(page, "the map of")
    expect(page.locator("#warm")).not_to_have_text("0 tokens")


def test_settings_reach_the_server_and_what_is_refused_is_said(open_page):
    page = open_page()
    page.select_option("#sampler", "full")
    drop(page, "sea.txt", DOCUMENT)
    ask(page, "the sea of")
    expect(page.locator("#error")).to_have_text("none: exact")
    assert page.locator("#heat div").all_inner_texts() == ["0\n100 %", "1\n100 %", "2\n100 %"]
    page.fill("#budget", "-1")
    page.select_option("#sampler", "sketch")
    page.fill("#question", "the cat")
    with page.expect_response("**/v1/chat/completions") as found:
        page.keyboard.press("Enter")
    assert found.value.status == 400
    expect(page.locator("#log .wrong")).to_contain_text("budget")


def test_an_answer_is_stopped_by_keyboard(open_page, live):
    page = open_page()
    go_on(page, 100_000)
    page.fill("#question", "the cat of the sea")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_text("Stop")
    expect(page.locator("#speed")).not_to_have_text("–", timeout=ANSWERED)
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator("#question")).to_be_focused()
    page.wait_for_timeout(1000)
    assert live.engine.unfinished == 0, "the server was told"


def test_all_controls_are_reached_by_tab_and_have_names(open_page):
    page = open_page()
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["log", "question", "send", "drop", "sampler", "budget"]
    for role, label in (("textbox", "Question"), ("combobox", "How keys are picked"), ("textbox", "Budget")):
        assert page.get_by_role(role, name=label).count() == 1


def test_a_phone_shows_it_without_scrolling_sideways(open_page):
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.locator("#question").tap()
    ask(page, "the cat")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    expect(page.locator("#send")).to_be_in_viewport()


def test_dark_and_light_can_be_read(open_page):
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        pairs = page.evaluate(
            """() => ["body", "#log .hint", "#send", "#drop", "dt"].map(selector => {
                const element = document.querySelector(selector);
                let behind = element;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [selector, getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
            })"""
        )
        for selector, ink, paper in pairs:
            assert _contrast(ink, paper) >= 4.5, (scheme, selector)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_pictures(size, scheme, open_page, live):
    task = generate("niah_single_1", live.tokenizer, 4000, index=0)
    options = {"viewport": DESKTOP} if size == "desktop" else {"viewport": PHONE, "device_scale_factor": 2}
    page = open_page(color_scheme=scheme, **options)
    drop(page, "field-notes.txt", task.context)
    ask(page, task.question)
    assert task.answers[0] in page.locator("#log .answer").inner_text()
    picture(page, f"page-{size}-{scheme}")


def _contrast(ink, paper):
    def light(colour):
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(ink), light(paper)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_picture_of_the_chat(browser, live, tmp_path):
    """`magicpig chat` in a terminal of its own, asked about a document."""
    task = generate("niah_single_1", live.tokenizer, 4000, index=0)
    (tmp_path / "field-notes.txt").write_text(task.context)
    said, (ours, theirs) = "", pty.openpty()
    command = [sys.executable, "-m", "magicpig", "chat", "--doc", "field-notes.txt"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path) as process:
        os.close(theirs)
        for question, answered in (
            (" ".join(task.question.split()), task.answers[0]),
            ("/stats", "error"),
            ("/quit", ""),
        ):
            while not said.endswith("> "):
                said += os.read(ours, 4096).decode()
            os.write(ours, f"{question}\n".encode())
            said += os.read(ours, 4096).decode()
            while answered not in said:
                said += os.read(ours, 4096).decode()
        assert process.wait(30) == 0
    os.close(ours)
    console = Console(record=True, width=100, file=io.StringIO())
    shown = said[said.index("Ask something") :].replace("\r", "").removesuffix("\n")
    console.print(Text.from_ansi(f"$ magicpig chat --doc field-notes.txt\n{shown}"))
    page = browser.new_page(viewport={"width": 1000, "height": 520})
    page.set_content(console.export_svg(title="magicpig chat"))
    picture(page.locator("svg.rich-terminal"), "chat")
    page.close()
