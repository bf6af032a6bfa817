"""The golden rows: small data sets of every format, rendered by every template, with their ids and masks in a file.

`python -m tests.data.write_golden` renders them anew and writes the file. It refuses where a stored row has changed and
RENDERER_VERSION has not: users' token stores are found again by that number.
"""

import itertools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from minorca import load_tokenizer
from minorca.config import DataConfig, Format, Source
from minorca.data import rendering
from minorca.data.sources import open_source, read_rows
from minorca.data.tokenizer import Tokenizer
from tests.data.test_chat_template import CHATML
from tests.data.test_tokenizer import NAMES, V1, V2, V3, orca, sentencepiece_directory
from tests.helpers import ROOT

GOLDEN = Path(__file__).parent / "golden" / "rendered_rows.json"
COMMAND = "python -m tests.data.write_golden"

# Mistral's own, without its checks, and with the system prompt as a message of its own.
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)
UNICODE = "Ünïcode 日本語 🦜\n\n\ttabs and  runs"
DIALOGUE = [
    {"role": "system", "content": "Count.\n"},
    {"role": "user", "content": "One <|im_end|>"},
    {"role": "assistant", "content": " 1 [/INST]", "weight": 0},
    {"role": "user", "content": "Two"},
    {"role": "assistant", "content": "\n2 </s> "},
]
RECORDS: dict[Format, list[dict]] = {
    "openorca": [
        {"id": "1", "system_prompt": "Don’t guess.", "question": "What is 2 + 2?", "response": "4"},
        {"id": "2", "system_prompt": None, "question": UNICODE, "response": f"  {UNICODE}  "},
        {"id": "3", "system_prompt": "", "question": "Empty", "response": " \n"},
        {"id": "4", "system_prompt": "", "question": "Say it " * 12, "response": "it " * 12},
        {"id": "1", "system_prompt": "Don’t guess.", "question": "What is 2 + 2?", "response": "4"},
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "system", "value": "You’re brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello", "weight": 0},
                {"from": "human", "value": " Bye "},
                {"from": "gpt", "value": "See you", "weight": 1},
            ]
        }
    ],
    "messages": [{"messages": DIALOGUE}],
    "alpaca": [{"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."}],
    "prompt_completion": [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]},
    ],
    "text": [{"text": "Once upon a time <s>"}, {"text": f"  {UNICODE} "}],
    "preference": [
        {"system": "Don’t guess.", "question": "What is 2 + 2?", "chosen": " 4", "rejected": f"{UNICODE}\n"},
        {"chosen": DIALOGUE, "rejected": [*DIALOGUE[:4], {"role": "assistant", "content": "\n2 <|im_end|>"}]},
        {
            "prompt": "2 + 2?",
            "completions": [{"text": text, "score": n} for n, text in enumerate(("5", "4 ", "4", ""))],
        },
        {"prompt": "2 + 2?", "completion": "4", "label": True},
    ],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "response, whole": {"train_on": "response"},
    "all, truncated": {"train_on": "all", "too_long": "truncate", "seq_len": 24},
    "every pair": {"pairs": "all"},
}


def tokenizers(smollm2: Path, directory: Path) -> dict[str, tuple[Tokenizer, list[str]]]:
    """{name: (tokenizer, the templates to render with)}: SmolLM2's, and mistral-common's real SentencePiece files."""
    versions = {f"v{n}": source for n, source in enumerate((V1, V2, V3), 1)}
    mistral = {
        name: sentencepiece_directory(directory / name, source, f"tokenizer.model.{name}")
        for name, source in versions.items()
    }
    with_jinja = NAMES | {"chat_template": INSTRUCT}
    return {
        "smollm2": (load_tokenizer(smollm2), ["jinja", "chatml"]),
        "orca": (
            load_tokenizer(orca(directory / "orca", tokenizer_config={"chat_template": CHATML})),
            ["chatml", "jinja"],
        ),
        "v1": (load_tokenizer(mistral["v1"]), ["mistral-v1"]),
        "v2": (load_tokenizer(mistral["v2"]), ["mistral-v2"]),
        "v3": (load_tokenizer(mistral["v3"]), ["mistral-v3"]),
        "v3 with a template": (
            load_tokenizer(sentencepiece_directory(directory / "jinja", V3, tokenizer_config=with_jinja)),
            ["jinja"],
        ),
    }


def render_golden_rows(smollm2: Path, directory: Path) -> dict[str, list[dict]]:
    """The rows of each case; `directory` gets the files that they are read from."""
    for format, records in RECORDS.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (directory / f"{format}.jsonl").write_text("".join(lines), encoding="utf-8")
    cases = {}
    for name, (tok, templates) in tokenizers(smollm2, directory).items():
        for template, settings, format in itertools.product(templates, SETTINGS, RECORDS):
            if (format == "preference") != (settings == "every pair"):
                continue
            case = f"{name}, {template}, {settings}, {format}"
            cases[case] = _render(tok, template, SETTINGS[settings], format, directory / f"{format}.jsonl")
    return cases


def _render(tok: Tokenizer, template: str, settings: dict[str, Any], format: Format, path: Path) -> list[dict]:
    rows = read_rows(open_source(Source(str(path), format), None), None, Counter())
    store, _ = rendering.render_rows(rows, tok, DataConfig(str(path), **settings), template)
    rendered = []
    for n, number in enumerate(store.numbers):
        ids, trained = store.row(n)
        mask = "".join(str(int(one)) for one in trained)
        rendered.append({"line": int(number), "ids": " ".join(map(str, ids)), "trained": mask})
        if store.has_branches:
            rendered[-1]["branches"] = [[int(start), float(score)] for start, score in zip(*store.branches(n))]
    return rendered


def problem(golden: dict, rendered: dict[str, list[dict]]) -> str | None:
    """What is wrong where rows are not rendered as in the golden file, and what to do."""
    if golden["renderer_version"] != rendering.RENDERER_VERSION:
        return (
            f"RENDERER_VERSION is {rendering.RENDERER_VERSION}, the golden rows are of {golden['renderer_version']}; "
            f"write them anew: {COMMAND}"
        )
    changed = [case for case, rows in golden["cases"].items() if rendered.get(case) != rows]
    if changed:
        return (
            f"{len(changed)} of {len(golden['cases'])} cases are rendered differently, the first is {changed[0]!r}. "
            f"If this is intended, raise RENDERER_VERSION in minorca/data/rendering.py, so that nobody trains on rows "
            f"of the old renderer, and then write the golden rows anew: {COMMAND}"
        )
    if new := rendered.keys() - golden["cases"].keys():
        return f"{len(new)} cases are not in the golden file; write it anew: {COMMAND}"
    return None


def write(golden: Path, rendered: dict[str, list[dict]]) -> None:
    """Writes the golden file.

    Raises:
        SystemExit: a case that is in it has changed, and the renderer's version has not.
    """
    if golden.exists():
        stored = json.loads(golden.read_text(encoding="utf-8"))
        kept = {case: rendered.get(case) for case in stored["cases"]}
        if stored["renderer_version"] == rendering.RENDERER_VERSION and kept != stored["cases"]:
            sys.exit(problem(stored, rendered))
    content = {"renderer_version": rendering.RENDERER_VERSION, "cases": rendered}
    golden.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        write(GOLDEN, render_golden_rows(ROOT / "examples" / "model", Path(directory)))
