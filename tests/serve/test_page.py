"""The chat page in a browser: Debian's chromium, controlled by Playwright."""

import json
import shutil

import pytest

from tests.serve.test_serve import SAYS, serving, talker  # noqa: F401

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("chromium"), reason="needs a chromium")]


@pytest.fixture(scope="module")
def server(talker):  # noqa: F811
    with serving("--model", talker, "--api-key", "secret") as server:
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
    page.goto(server.url)
    sync_api.expect(page.get_by_role("alert")).to_contain_text("API key")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    sync_api.expect(page.get_by_label("Model")).to_have_value("talker")
    sync_api.expect(page.get_by_role("alert")).to_be_empty()
    yield page
    page.close()
    assert complaints == []


def ask(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_a_conversation(page):
    """By the keyboard alone; the answer is streamed, stopped, and part of the next request."""
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    ask(page, "What does a clock say?")
    answer = page.locator("p.assistant")
    sync_api.expect(answer).to_contain_text(SAYS * 2)
    first = len(answer.inner_text())
    page.wait_for_function("length => document.querySelector('p.assistant').textContent.length > length", arg=first)
    page.get_by_role("button", name="Stop").click()
    sync_api.expect(answer).to_contain_text("[stopped]")
    ask(page, "And <b>then</b>?")
    page.get_by_role("button", name="Stop").press("Enter")
    kept = answer.first.inner_text().removesuffix(" [stopped]")
    assert sent[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does a clock say?"},
    ]
    assert sent[0]["temperature"] == 0 and (SAYS * 1000).startswith(kept)
    said = [{"role": "assistant", "content": kept}, {"role": "user", "content": "And <b>then</b>?"}]
    assert sent[1]["messages"] == [*sent[0]["messages"], *said]
    page.get_by_role("button", name="New conversation").click()
    sync_api.expect(page.get_by_role("log").locator("p")).to_have_count(0)
    ask(page, "Again")
    sync_api.expect(page.locator("p.assistant")).to_contain_text("tick")
    assert [message["content"] for message in sent[2]["messages"]] == ["Be brief.", "Again"]


def test_text_is_not_html(page):
    """Neither the user's nor the model's."""
    evil = "<img src=x onerror=\"document.title='gotcha'\"><script>document.title='gotcha'</script>&lt;b&gt;"
    events = [
        {"choices": [{"delta": {"content": evil}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    ask(page, evil)
    sync_api.expect(page.locator("p.user")).to_have_text(evil)
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
    sync_api.expect(page.get_by_role("alert")).to_contain_text("temperature")
    assert page.get_by_role("log").locator("p").count() == 0


def test_the_key_is_not_stored(page, server):
    assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
    page.goto(server.url)
    assert page.get_by_label("API key").input_value() == ""
    sync_api.expect(page.get_by_role("alert")).to_contain_text("API key")
