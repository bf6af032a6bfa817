"""Which web pages can use the server: by cross-origin requests (CORS, in the Fetch standard), and by host names."""

import httpx
import pytest

from minorca.errors import UserError
from minorca.serve import __main__ as serve_command
from tests.serve.test_serve import assert_error, serving, talker  # noqa: F401

PAGE = "https://chat.example"
OTHERS = (
    "http://chat.example",
    "https://chat.example:8443",
    "https://evil.example",
    "https://chat.example.org",
    "null",
)
COMPLETION = {"model": "talker", "prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def server(talker):  # noqa: F811
    origins = ("--cors-origin", "http://localhost:3000", "--cors-origin", PAGE)
    with serving("--model", talker, *origins, "--allowed-host", "LLM.example", MINORCA_API_KEY="sesame") as server:
        yield server


def preflight(server, origin: str, path: str = "/v1/completions", method: str = "POST") -> httpx.Response:
    """What a browser asks before a request with a key and a JSON body: without the key."""
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.options(server.url + path, headers={"Origin": origin} | asked)


def may_read(response: httpx.Response, origin: str) -> bool:
    """The standard's CORS check of a request without credentials."""
    return response.headers.get("access-control-allow-origin") in ("*", origin)


def test_an_allowed_page_may_send_and_read(server):
    for origin in (PAGE, "http://localhost:3000"):
        response = preflight(server, origin)
        assert response.is_success and may_read(response, origin)
        assert {"authorization", "content-type"} <= set(response.headers["access-control-allow-headers"].split(","))
        assert "POST" in response.headers["access-control-allow-methods"]
        headers = {"Origin": origin, "Authorization": "Bearer sesame"}
        response = httpx.post(f"{server.url}/v1/completions", headers=headers, json=COMPLETION)
        assert response.status_code == 200 and may_read(response, origin)
        assert response.headers["vary"] == "Origin"
        # Cookies and client certificates stay out of it.
        assert "access-control-allow-credentials" not in response.headers


def test_an_allowed_page_may_read_errors(server):
    for key, path, body, status in (
        ("wrong", "/v1/completions", COMPLETION, 401),
        ("sesame", "/v1/completions", {}, 400),
        ("sesame", "/nowhere", {}, 404),
    ):
        headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
        response = httpx.post(server.url + path, headers=headers, json=body)
        assert_error(response, status)
        assert may_read(response, PAGE)
    streamed = httpx.post(
        f"{server.url}/v1/completions",
        headers={"Origin": PAGE, "Authorization": "Bearer sesame"},
        json=COMPLETION | {"stream": True},
    )
    assert may_read(streamed, PAGE) and "[DONE]" in streamed.text


def test_other_pages_may_not(server):
    for origin in OTHERS:
        response = preflight(server, origin)
        assert not response.is_success and not may_read(response, origin)
        for headers in ({}, {"Authorization": "Bearer sesame"}):
            response = httpx.get(f"{server.url}/v1/models", headers={"Origin": origin} | headers)
            assert response.status_code == (200 if headers else 401) and not may_read(response, origin)
    assert not preflight(server, PAGE, method="DELETE").is_success


def test_all_pages_may(talker):  # noqa: F811
    with serving("--model", talker, "--cors-origin", "*") as server:
        for origin in (PAGE, *OTHERS):
            assert preflight(server, origin).is_success and may_read(preflight(server, origin), origin)
            response = httpx.post(f"{server.url}/v1/completions", headers={"Origin": origin}, json=COMPLETION)
            assert response.status_code == 200 and may_read(response, origin)
        # DNS rebinding, which is another way in, stays closed.
        assert_error(httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}))


def statuses(server, *hosts: str) -> set[int]:
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    return {httpx.get(f"{url}/health", headers={"Host": host}).status_code for host in hosts}


def test_allowed_hosts(server, talker):  # noqa: F811
    """Beside this machine's own, also where other machines may connect."""
    local = ("localhost", "127.0.0.1:1", "[::1]")
    named = ("llm.example", "LLM.example:8443")
    others = ("evil.example", "llm.example.evil.example", "x.llm.example", "")
    with serving("--model", talker, "--host", "0.0.0.0", "--allowed-host", "llm.example") as everywhere:
        for each in (server, everywhere):
            assert statuses(each, *local, *named) == {200}
            assert statuses(each, *others) == {400}
    said = assert_error(httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}))
    assert "llm.example" in said["message"] and "--allowed-host" in said["message"]


@pytest.mark.parametrize(
    "option, values",
    [
        (
            "--cors-origin",
            ("chat.example", "https://", "https://chat.example/", "https://chat.example/a", "https://chat .example", "")
            + ("HTTPS://chat.example", "https://chat.example:x", "https://a@chat.example", "null", "https://*.example"),
        ),
        ("--allowed-host", ("http://a", "a:8000", "a/b", "a b", "", "::1", "*")),
    ],
)
def test_values_that_name_no_origin_or_host(option, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{option} is .*; expected an? "):
            serve_command.main(["--model", "nowhere", option, value])
