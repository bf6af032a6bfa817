"""The tests that the README names exist."""

import re

from tests.helpers import ROOT


def test_every_promise_names_tests_that_are_there():
    table = (ROOT / "README.md").read_text().split("## What a run promises")[1].split("Not promised")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for row in rows:
        files = re.split(r"`?(test_\w+\.py)", row.split("|")[-2])
        assert len(files) > 1, row
        for file, words in zip(files[1::2], files[2::2]):
            names = re.findall(r"^def (test_\w+)", next((ROOT / "tests").rglob(file)).read_text(), re.M)
            for expression, starred in re.findall(r"-k (?:\"([^\"]+)\"|(\w+))", words):
                for word in (expression or starred).split(" or "):
                    assert any(word in name for name in names), f"{file} has no test with {word} in its name"
