"""Scores beside the published ones."""

import json
import re
from typing import Any

import pytest

from minorca.errors import UserError
from minorca.evaluate import report, suites
from minorca.evaluate.published import COLUMNS, MT_BENCH_MEAN, PUBLISHED, SOURCES
from minorca.evaluate.suites import Score, SuiteResult


def result(name: str, value: float = 50.0, rows: int = 100) -> SuiteResult:
    suite = suites.SUITES[name]
    members = [Score(m.name, value, 1.5, "acc, zero-shot", rows, 100) for m in suite.members]
    averages = [suites.mean(average, members, "unweighted") for average in suite.averages]
    return SuiteResult(name, suite.title, averages, members)


def mt_bench() -> SuiteResult:
    return SuiteResult("mt-bench", "MT-Bench", [Score(MT_BENCH_MEAN, 5.25, 0.2, "160 judgments", 160, 160)], [])


ALL = [*map(result, suites.SUITES), mt_bench()]


def cells(markdown: str, name: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if re.match(rf"\| \**{re.escape(name)}\** \|", line)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_published_score_is_of_a_row_of_its_suite():
    """A name that no suite has would never be shown."""
    rows = {name: {m.name for m in suite.members} | {*suite.averages} for name, suite in suites.SUITES.items()}
    rows["mt-bench"] = {MT_BENCH_MEAN}
    assert PUBLISHED.keys() == rows.keys()
    for name, published in PUBLISHED.items():
        for (column, row), found in published.items():
            assert column in COLUMNS
            assert row in rows[name]
            assert found.source in SOURCES
            assert found.note in report.MARKS


def test_the_table_has_ours_beside_the_published_scores():
    text = report.to_markdown(ALL, "my|model", "float32, without BOS")
    assert "\nmy\\|model: float32, without BOS.\n" in text
    average = cells(text, "mean of ARC, HellaSwag, MMLU and TruthfulQA")
    assert average[1:5] == ["50.00 ± 0.61", "62.40 (u)", "65.33", "65.84"]
    assert cells(text, "mean of all judgments")[1:5] == ["5.25 ± 0.20", "", "6.86", ""]
    assert cells(text, "mean of multiple_choice_grade")[2] == "35.00 (d)"
    assert cells(text, "snarks")[1:5] == ["50.00 ± 1.50", "", "", ""]
    assert text.count("| my\\|model |") == 5
    # all tables are of one width, and name their sources
    assert all(line.count("|") - line.count("\\|") == 7 for line in text.splitlines() if line.startswith("|"))
    assert all(source in text for source in SOURCES.values())
    assert "only" not in text


def test_what_was_limited_or_has_no_standard_error_says_so():
    limited = result("agieval", rows=10)
    text = report.to_markdown([limited], "m", "")
    assert "only 10 of 100 rows" in cells(text, "sat-en")[-1]
    assert "only 80 of 800 rows" in cells(text, "mean of acc_norm")[-1]
    unknown = SuiteResult("mt-bench", "MT-Bench", [Score(MT_BENCH_MEAN, 5.0, None, "", 1, 1)], [])
    assert cells(report.to_markdown([unknown], "m", ""), MT_BENCH_MEAN)[1] == "5.00"


@pytest.mark.parametrize("results", [ALL, [result("bigbench-hard")]], ids=["all", "one"])
def test_the_files(results, tmp_path):
    file = tmp_path / "scores.json"
    report.write(results, "model", "bfloat16", file)
    written = report.to_json(results)
    assert written == json.loads(json.dumps(written))
    for found in results:
        scores = written[found.suite]["averages"] + written[found.suite]["members"]
        assert [score["name"] for score in scores] == [s.name for s in (*found.averages, *found.members)]
    card = written["bigbench-hard"]["averages"][0]["published"]["OpenOrca, card"]
    assert card == {"value": 41.6, "note": "", "source": SOURCES["first card"]}
    assert (tmp_path / "scores.md").read_text() == report.to_markdown(results, "model", "bfloat16")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_the_bars_are_the_scores():
    axis = report.make_figure(ALL, "model").axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["HF leaderboard v1", "AGIEval", "BigBench-Hard", "GPT4ALL", "MT-Bench x 10"]
    handles: list[Any]
    handles, names = axis.get_legend_handles_labels()
    assert names == ["model", *COLUMNS]
    bars = {name: [bar.get_width() for bar in handle.patches] for name, handle in zip(names, handles)}
    assert bars["model"] == pytest.approx([50, 50, 50, 50, 52.5])
    assert bars["OpenOrca, card"] == pytest.approx([65.33, 39.7, 41.6, 72.38, 68.6])
    (error,) = handles[0].errorbar[2]
    widths = [line[1][0] - line[0][0] for line in error.get_segments()]
    assert widths[-1] == pytest.approx(2 * 10 * 0.2)
    single = report.make_figure([result("agieval")], "model").axes[0]
    assert len(single.get_yticklabels()) == 9


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        report.write(ALL, "model", "", tmp_path / "none" / "scores.json")
