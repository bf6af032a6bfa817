"""Files that suites read, and an endpoint that judges."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHOICES = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
# A row of each data set of the suite gpt4all, in the hub's schema.
ROWS = {
    "allenai/ai2_arc/ARC-Easy/test": {"question": "Which?", "choices": CHOICES, "answerKey": "B"},
    "allenai/ai2_arc/ARC-Challenge/test": {"question": "Which one?", "choices": CHOICES, "answerKey": "C"},
    "Rowan/hellaswag/data/validation": {
        "activity_label": "Cooking",
        "ctx_a": "A man stirs.",
        "ctx_b": "he",
        "endings": ["eats.", "runs [title] away.", "sings.", "sleeps."],
        "label": "2",
    },
    "allenai/openbookqa/main/test": {"question_stem": "The sun is", "choices": CHOICES, "answerKey": "A"},
    "allenai/winogrande/winogrande_xl/validation": {
        "sentence": "Ann thanked Eve because _ had helped.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    },
    "aps/super_glue/boolq/validation": {"passage": "Snow is cold.", "question": "is snow cold", "label": 1},
    "baber/piqa/plain_text/validation": {"goal": "Open a door", "sol1": "push", "sol2": "sing", "label": 0},
}
# Of the other suites: one subject of MMLU and one task of AGIEval.
MORE_ROWS = {
    "truthfulqa/truthful_qa/multiple_choice/validation": {
        "question": "Who flew first?",
        "mc1_targets": {"choices": ["Ann", "Eve", "Bob"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["Ann", "Eve", "Bob"], "labels": [1, 1, 0]},
    },
    "openai/gsm8k/main/train": {"question": "2 + 2?", "answer": "It is 4. #### 4"},
    "openai/gsm8k/main/test": {"question": "2 + 3?", "answer": "It is 5. #### 5"},
    "cais/mmlu/anatomy/dev": {"question": "Which bone?", "choices": ["a", "b", "c", "d"], "answer": 1},
    "cais/mmlu/anatomy/test": {"question": "Which one?", "choices": ["a", "b", "c", "d"], "answer": 3},
    "hails/agieval-sat-math/data/test": {"query": "Q: 1 + 1? A:", "choices": ["(A) 1", "(B) 2"], "gold": [1]},
}


def write_rows(data: Path, rows: dict, count: int = 6) -> None:
    """Writes several of each row, as the hub's files lie; those of AI2 as parquet."""
    import datasets

    for path, row in rows.items():
        text = next(key for key, value in row.items() if isinstance(value, str))
        table = datasets.Dataset.from_list([row | {text: f"{row[text]} {i}"} for i in range(count)])
        file = data / f"{path}-00000-of-00001"
        file.parent.mkdir(parents=True, exist_ok=True)
        if "ai2_arc" in path:
            table.to_parquet(file.with_suffix(".parquet"))
        else:
            table.to_json(file.with_suffix(".jsonl"))


# MT-Bench's prompts of the judge, in short, and questions
PROMPTS = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": "R {ref_answer_1} {ref_answer_2} Q {question_1} A {answer_1} {question_2} {answer_2}",
}
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write {a} line.", "Shorter."]},
    {"question_id": 111, "category": "math", "turns": ["2 + 2?", "Times 3?"], "reference": ["It is 4.", "It is 12."]},
    {"question_id": 131, "category": "extraction", "turns": ["Name the dog: Rex barks.", "And in capitals?"]},
]


def write_lines(file: Path, lines: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def prompt_lines(**changes) -> list[dict]:
    """The judge's prompts as FastChat writes them, beside one of another type."""
    lines: list[dict] = [{"name": "pair-v2", "type": "pairwise", "output_format": "[[A]]"}]
    for name, template in PROMPTS.items():
        line = {"name": name, "type": "single", "system_prompt": f"You judge by {name}.", "prompt_template": template}
        lines.append(line | {"output_format": "[[rating]]", "category": "general", "description": "text"} | changes)
    return lines


# answers of a broken endpoint, with their status
BODIES = {
    "html": (200, b"<html>busy</html>"),
    "bytes": (200, b"\xff\xfe"),
    "null": (200, b'{"choices": [{"message": {"content": null}}]}'),
    "deep": (500, b"[" * 90000),
}


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that rates by the prompt's length, and fails as `plan` says, request by request."""

    daemon_threads = True

    def __init__(self, plan: Iterator[str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan = plan
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.retry_after = "0"
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
            fault = next(self.server.plan, "")
        if fault == "closed":
            self.close_connection = True
            return
        if fault in BODIES:
            status, body = BODIES[fault]
            self.send(status, body)
            return
        if fault.isdigit():
            self.answer(int(fault), {"error": {"message": f"not now: {fault}"}})
            return
        rating = len(body["messages"][1]["content"]) % 10 + 1
        content = f"Good. Rating: [[{rating}]]" if fault != "unrated" else "Good."
        choices = [{"index": 0, "message": {"role": "assistant", "content": content}}]
        self.answer(200, {"object": "chat.completion", "choices": choices if fault != "empty" else []})

    def answer(self, status: int, value: dict) -> None:
        self.send(status, json.dumps(value).encode())

    def send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
