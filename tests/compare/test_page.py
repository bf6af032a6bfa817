"""The page of a comparison in a browser: Debian's chromium, controlled by Playwright."""

import math
import shutil
from typing import Any

import pytest

from minorca.compare.__main__ import _json_values
from minorca.compare.page import render_page

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("chromium"), reason="needs a chromium")]

EVIL = "<img src=x onerror=\"document.title='gotcha'\"><script>document.title='gotcha'</script>&lt;b&gt;"


def row(place: str, answers: tuple[str, str], difference: float, kl: list[float], reference: str) -> dict[str, Any]:
    side = {"tokens": len(kl), "logp": -2.0, "perplexity": math.e, "perplexity_per_byte": math.nan}
    return {
        "place": place,
        "messages": [{"role": "user", "content": f"Question of {place}"}],
        "reference": reference,
        "same": answers[0] == answers[1],
        "a": side | {"answer": answers[0]},
        "b": side | {"answer": answers[1]},
        "difference": difference,
        "kl": {"kl_a_b": sum(kl) / len(kl), "kl_b_a": 0.1},
        "tokens": {"text": list(reference), "kl_a_b": kl, "kl_b_a": kl, "logp_a": kl, "logp_b": kl},
    }


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """On a phone, in the dark; errors, refusals of the policy and requests fail the test."""
    rows = [
        row("line 1", ("yes", "yes"), 0.5, [0.0, 0.02], "ja"),
        row("line 2", (EVIL, "no"), -3.0, [0.3, 1.5], "no"),
        row("line 3", ("perhaps", "never"), 2.0, [0.1, 0.1], "ok"),
    ]
    side = rows[0]["a"] | {"path": EVIL, "model": "base", "adapter": "adapter", "template": "chatml"}
    interval = {"mean": -0.2, "standard_error": 1.0, "interval": (-1.0, 1.0), "p_value": 0.5, "rows": 3, "test": "t"}
    result = {
        "a": side,
        "b": side,
        "difference": interval,
        "kl": {"kl_a_b": 0.3, "kl_b_a": 0.1},
        "kl_refused": None,
        "same_answers": 1,
        "answers": 3,
        "left_out": ["line 4"],
        "notes": {"equal answers": 2},
        "scored": "the reference answers",
        "rows": rows,
    }
    (tmp_path / "page.html").write_text(render_page(_json_values(result)))
    page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme="dark")
    complaints, requested = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: requested.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    assert complaints == [] and {url[:5] for url in requested} <= {"file:", "data:"}
    page.close()


def shown(page) -> list[str]:
    return [text.split(" ·")[0] for text in page.locator("article:visible h2").all_inner_texts()]


def test_filter_and_sort(page):
    assert shown(page) == ["line 1", "line 2", "line 3"]
    sync_api.expect(page.locator("#count")).to_have_text("3 of 3 shown")
    orders = {"largest difference": "231", "A - B, descending": "312", "A - B, ascending": "213", "KL(A || B)": "231"}
    for order, expected in orders.items():
        page.get_by_label("Sort by").select_option(order)
        assert shown(page) == [f"line {n}" for n in expected]
    page.get_by_label("Show").select_option("different answers")
    assert shown(page) == ["line 2", "line 3"]
    page.get_by_label("Show").select_option("A likelier on the reference")
    assert shown(page) == ["line 3", "line 1"]
    page.get_by_label("Containing").fill("PERHAPS")
    assert shown(page) == ["line 3"]
    page.get_by_label("Containing").press("Enter")
    sync_api.expect(page.locator("#count")).to_have_text("1 of 3 shown")


def test_text_is_not_html(page):
    assert page.title() == f"minorca: {EVIL} and {EVIL}"
    assert page.locator("article").nth(1).locator(".answers p").first.inner_text() == EVIL
    assert page.locator("img, main b, main script").count() == 0


def test_tokens_are_shaded_and_have_their_numbers(page):
    tokens = page.locator("article").nth(1).locator("[data-n]")
    assert [tokens.nth(n).get_attribute("class") for n in range(2)] == ["k3", "k5"]
    tokens.nth(1).click()
    note = page.locator("article").nth(1).get_by_role("status")
    sync_api.expect(note).to_have_text("o: KL(A || B) 1.5, KL(B || A) 1.5, log-probability A 1.5, B 1.5")


def test_it_fits_a_phone_and_follows_its_colors(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(22, 24, 26)"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) == "rgb(246, 246, 243)"
    # text stands out from what is behind it, also where a token is shaded most
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST) >= 4.5


# WCAG's contrast of text on the darkest shade, which lies half transparent on a card
CONTRAST = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const token = document.querySelector(".k5"), card = token.closest("article");
  const [r, g, b, alpha] = parse(getComputedStyle(token).backgroundColor);
  const behind = parse(getComputedStyle(card).backgroundColor);
  const mixed = [r, g, b].map((c, i) => c * alpha + behind[i] * (1 - alpha));
  const luminance = rgb => rgb.map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const [one, two] = [luminance(mixed), luminance(parse(getComputedStyle(token).color).slice(0, 3))];
  return (Math.max(one, two) + .05) / (Math.min(one, two) + .05);
})()"""
