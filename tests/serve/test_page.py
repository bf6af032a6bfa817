"""The chat page in a browser: Debian's chromium, controlled by Playwright."""

import json
import shutil
from collections import Counter
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from minorca.config import Source
from minorca.data.sources import open_source, read_rows
from tests.helpers import random_adapter
from tests.serve.test_serve import SAYS, serving, talker  # noqa: F401

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("chromium"), reason="needs a chromium")]


@pytest.fixture(scope="module")
def server(talker):  # noqa: F811
    """With an adapter that says the same."""
    adapter = talker.parent / "other"
    random_adapter(AutoModelForCausalLM.from_pretrained(talker), adapter, ("q",))
    with serving("--model", talker, "--adapter", adapter, "--api-key", "secret") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """With the key entered; errors in the browser fail the test."""
    page = browser.new_page()
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if "Content Security Policy" in message.text else None,
    )
    open_page(page, server)
    yield page
    page.close()
    assert complaints == []


def open_page(page, server) -> None:
    page.goto(server.url)
    sync_api.expect(page.get_by_role("alert")).to_contain_text("API key")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    sync_api.expect(page.get_by_label("Model")).not_to_have_value("")
    sync_api.expect(page.get_by_role("alert")).to_be_empty()


def ask(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def bodies(page) -> list[dict]:
    """Of the requests that the page sends from now on."""
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    return sent


def reply(page, text: str) -> None:
    """Answers the page in place of the server."""
    events = [
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))


def test_a_conversation(page):
    """By the keyboard alone; the answer is streamed, stopped, and part of the next request."""
    sent = bodies(page)
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    ask(page, "What does a clock say?")
    answer = page.locator("p.assistant")
    sync_api.expect(answer).to_contain_text(SAYS * 2)
    first = len(answer.inner_text())
    page.wait_for_function("length => document.querySelector('p.assistant').textContent.length > length", arg=first)
    page.get_by_role("button", name="Stop").click()
    note = page.locator("footer span")
    sync_api.expect(note).to_have_text("talker · stopped")
    ask(page, "And <b>then</b>?")
    sync_api.expect(answer.nth(1)).to_contain_text("tick")
    page.keyboard.press("Escape")
    sync_api.expect(note.nth(1)).to_have_text("talker · stopped")
    kept = answer.first.text_content()
    assert sent[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does a clock say?"},
    ]
    assert sent[0]["temperature"] == 0 and (SAYS * 1000).startswith(kept)
    said = [{"role": "assistant", "content": kept}, {"role": "user", "content": "And <b>then</b>?"}]
    assert sent[1]["messages"] == [*sent[0]["messages"], *said]
    page.get_by_role("button", name="Clear").click()
    sync_api.expect(page.get_by_role("log").locator("p")).to_have_count(0)
    ask(page, "Again")
    sync_api.expect(answer).to_contain_text("tick")
    assert [message["content"] for message in sent[2]["messages"]] == ["Be brief.", "Again"]


def test_settings_are_sent_and_the_speed_is_shown(page):
    """Empty ones are left to the server."""
    sent = bodies(page)
    page.get_by_label("Top p").fill("0.5")
    page.get_by_label("Maximum tokens").fill("30")
    page.get_by_label("Seed").fill("-7")
    page.get_by_label("Temperature").fill("")
    ask(page, "Hello?")
    sync_api.expect(page.locator("footer span")).to_contain_text("length limit reached")
    model, tokens, speed, _ = page.locator("footer span").inner_text().split(" · ")
    assert (model, tokens) == ("talker", "30 tokens") and float(speed.removesuffix(" tokens/s")) > 0
    fields = {name: value for name, value in sent[0].items() if name not in ("model", "messages")}
    expected = {"top_p": 0.5, "max_tokens": 30, "seed": -7, "stream": True, "stream_options": {"include_usage": True}}
    assert fields == expected


def test_two_models_answer_side_by_side(page):
    """Each goes on with its own answers; the first's stand for those that the second has not given."""
    sent = bodies(page)
    page.get_by_label("Maximum tokens").fill("5")
    page.get_by_label("Model").select_option("other")
    reply(page, "alone")
    ask(page, "One?")
    sync_api.expect(page.locator("p.assistant")).to_have_text("alone")
    page.unroute_all()
    page.get_by_label("Compare with").select_option("talker")
    for question in ("Two?", "Three?"):
        ask(page, question)
        columns = page.locator(".turn").last.get_by_role("region")
        sync_api.expect(columns).to_have_count(2)
        sync_api.expect(page.locator("footer span").last).to_contain_text("length limit")
    boxes = [column.bounding_box() for column in columns.all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert [body["model"] for body in sent] == ["other", "other", "talker", "other", "talker"]
    for body in sent[3:]:
        assert [m["content"] for m in body["messages"][::2]] == ["One?", "Two?", "Three?"]
        assert body["messages"][1]["content"] == "alone" and body["messages"][3]["content"] in SAYS


def test_the_conversation_and_settings_outlive_the_page(page, server):
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Maximum tokens").fill("9")
    page.get_by_label("Model").select_option("other")
    ask(page, "Hello?")
    sync_api.expect(page.locator("footer span")).to_contain_text("length limit")
    texts = page.get_by_role("log").inner_text()
    open_page(page, server)
    assert page.get_by_role("log").inner_text() == texts
    assert page.get_by_label("System prompt").input_value() == "Be brief."
    sync_api.expect(page.get_by_label("Model")).to_have_value("other")
    # What had come of an answer, too.
    page.get_by_label("Maximum tokens").fill("")
    ask(page, "Again?")
    sync_api.expect(page.locator("p.assistant").nth(1)).to_contain_text("tick")
    open_page(page, server)
    sync_api.expect(page.locator("p.assistant").nth(1)).to_contain_text("tick")
    sync_api.expect(page.locator("footer span").nth(1)).to_contain_text("stopped")
    page.get_by_role("button", name="Clear").click()
    assert page.evaluate("localStorage.getItem('conversation')") is None
    open_page(page, server)
    assert page.get_by_role("log").locator("p").count() == 0
    page.evaluate("localStorage.setItem('conversation', '[{}]')")
    page.goto(server.url)
    sync_api.expect(page.get_by_label("Message")).to_be_focused()


def test_what_is_exported_can_be_trained_on(page, tmp_path):
    """One row for each model, read as data.format: messages; answers that were cut off are not trained."""
    page.get_by_label("System prompt").fill("Be brief.")
    reply(page, 'Tick.\n"Tock" é€😀 <|im_end|>')
    ask(page, "What does a clock say?")
    sync_api.expect(page.locator("p.assistant")).to_contain_text("Tick")
    page.unroute_all()
    page.get_by_label("Compare with").select_option("other")
    page.get_by_label("Maximum tokens").fill("3")
    ask(page, "And then?")
    sync_api.expect(page.locator("footer span").last).to_contain_text("length limit")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / download.value.suggested_filename
    assert file.suffix == ".jsonl"
    download.value.save_as(file)
    rows: list[Any] = list(read_rows(open_source(Source(str(file), format="messages"), None), None, Counter()))
    assert len(rows) == 2
    for row, text in zip(rows, page.locator(".turn").last.locator("p.assistant").all()):
        contents = [message["content"] for message in row.content.messages]
        said = ["Be brief.", "What does a clock say?", 'Tick.\n"Tock" é€😀 <|im_end|>', "And then?"]
        assert contents == [*said, text.text_content()]
        answers = [message for message in row.content.messages if message["role"] == "assistant"]
        assert [message.get("weight", 1) for message in answers] == [1, 0]


def test_an_answer_is_copied(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    reply(page, "line one\n  <b>line two</b>")
    ask(page, "Hello?")
    page.get_by_role("button", name="Copy").click()
    sync_api.expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "line one\n  <b>line two</b>"


def test_text_is_not_html(page):
    """Neither the user's nor the model's."""
    evil = "<img src=x onerror=\"document.title='gotcha'\"><script>document.title='gotcha'</script>&lt;b&gt;"
    reply(page, evil)
    ask(page, evil)
    sync_api.expect(page.locator("p.user")).to_have_text(evil)
    sync_api.expect(page.locator("p.assistant")).to_have_text(evil)
    page.reload()
    sync_api.expect(page.locator("p.assistant")).to_have_text(evil)
    assert page.title() == "minorca" and page.get_by_role("log").locator("img, script, b").count() == 0


def test_errors_are_shown(page):
    """And the message can be sent again."""
    page.get_by_label("API key").fill("wrong")
    ask(page, "Hello?")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("missing or invalid API key")
    sync_api.expect(page.get_by_label("Message")).to_have_value("Hello?")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("Temperature").fill("7")
    ask(page, "Hello?")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("Temperature: ")
    sync_api.expect(page.get_by_label("Message")).to_have_value("Hello?")
    assert page.get_by_role("log").locator("p").count() == 0


def test_the_key_is_not_stored(page, server):
    page.get_by_label("Maximum tokens").fill("3")
    ask(page, "Hello?")
    sync_api.expect(page.locator("footer span")).to_contain_text("length limit")
    stored = page.evaluate("Object.values(localStorage).join() + document.cookie")
    assert "Hello?" in stored and "secret" not in stored
    page.goto(server.url)
    assert page.get_by_label("API key").input_value() == ""
    sync_api.expect(page.get_by_role("alert")).to_contain_text("API key")


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_everything_has_a_name(page, width, scheme):
    """On a phone and a screen, with long words: nothing is cut off, texts can be read, controls are labelled."""
    page.set_viewport_size({"width": width, "height": 640})
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("Compare with").select_option("other")
    reply(page, "x" * 3000)
    ask(page, "y" * 500)
    sync_api.expect(page.locator("p.assistant")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.querySelectorAll('.turn *')].every(e => e.scrollWidth <= e.clientWidth + 1)")
    unnamed = """[...document.querySelectorAll('button, select, input, textarea')].filter(e =>
        !(e.getAttribute('aria-label') || e.textContent.trim() && e.matches('button') || e.labels?.length))"""
    assert page.evaluate(f"{unnamed}.length") == 0
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) > 8 and min(ratios) >= 4.5


# Of every text to what is behind it, as WCAG 2 defines them.
CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => channels(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    const color = getComputedStyle(element).backgroundColor;
    return channels(color)[3] === 0 ? behind(element.parentElement) : color;
  };
  return [...document.querySelectorAll('h1, label, select, summary, p.user, p.assistant, footer span, button:enabled')]
    .filter(element => element.checkVisibility()).map(element => {
      const [light, dark] = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => b - a);
      return (light + 0.05) / (dark + 0.05);
    });
}"""
