"""Texts that their authors rendered, documents, and prompts with their completions, all without a template."""

from tests.corpus import files
from tests.corpus.case import Case, Chat, Completion, Text, assistant, at, user

LINE = "rows.jsonl, line"
TEXT = {"format": "text"}
PARSED = "with control tokens parsed"
# One conversation in the formats of three families, with and without the ends that a tokenizer adds.
V1 = [
    "<s>[INST] 2 + 2? [/INST]4</s>",
    "<s>[INST] 2 + 2? [/INST] 4",
    " [INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST] ",
]
V3 = [
    "<s>[INST] 2 + 2?[/INST] 4</s>",
    "[INST] 2 + 2?[/INST] 4",
    "[AVAILABLE_TOOLS] [][/AVAILABLE_TOOLS][INST] Hi[/INST]",
]
CHATML = [
    "<s><|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  2?<|im_end|>\n<|im_start|>assistant\n4",
    "<|im_start|>user\né<|im_end|>\n",
]


def rendered(model: str, family: str, texts: list[str], parsed: int) -> Case:
    """Rows of text, `parsed` of which have control tokens."""
    return Case(
        f"text: {family}",
        {"rows.jsonl": files.jsonl(*({"text": text} for text in texts))},
        TEXT,
        at(LINE, *map(Text, texts)),
        {PARSED: parsed},
        model=model,
    )


# 70 characters that no merge joins.
LONG = "\n" * 70

RENDERED = [
    rendered("v1", "Mistral's v1", V1, 3),
    rendered("v3", "Mistral's v3", V3, 3),
    rendered("chatml", "ChatML", CHATML, 3),
    rendered("v3", "typed where no control token is so called", ["a <|im_end|> b", "[INST", "</s> in front"], 1),
    Case(
        "text: control strings that stay text",
        {"rows.jsonl": files.jsonl(*({"text": text} for text in (*V3, "plain")))},
        TEXT | {"parse_control_tokens": False},
        at(LINE, *map(Text, (*V3, "plain"))),
        model="plain",
    ),
    Case(
        "text: empty, null and blank",
        {"rows.jsonl": files.jsonl({"text": ""}, {"text": None}, {"text": " \n"}, {"text": "a"})},
        TEXT,
        [("rows.jsonl, line 4", Text("a"))],
        {"dropped: empty response": 3},
        model="v3",
    ),
    Case(
        "text: a column of another name",
        {"rows.parquet": files.parquet({"content": "def f():\n\treturn 1\n", "lang": "py"})},
        TEXT | {"columns": {"text": "content"}},
        at("rows.parquet, row", Text("def f():\n\treturn 1\n")),
        {"with the unused column lang": 1},
        model="v3",
    ),
]

LENGTHS = [
    Case(
        "text: too long, dropped",
        {"rows.jsonl": files.jsonl({"text": LONG + "x"}, {"text": "a"})},
        TEXT | {"seq_len": 32},
        [("rows.jsonl, line 2", Text("a"))],
        {"dropped: too long": 1},
        {"dropped: too long": "74 tokens"},
        model="v3",
    ),
    Case(
        "text: too long, truncated",
        {"rows.jsonl": files.jsonl({"text": LONG + "x"}, {"text": "a"})},
        TEXT | {"seq_len": 32, "too_long": "truncate"},
        at(LINE, Text(LONG + "x", end=32), Text("a")),
        {"truncated": 1},
        {"truncated": "42 tokens"},
        model="v3",
    ),
    Case(
        "text: too long, split so that each token after the first is trained once",
        {"rows.jsonl": files.jsonl({"text": LONG + "x"}, {"text": "a"})},
        TEXT | {"seq_len": 32, "too_long": "split"},
        [
            ("rows.jsonl, line 1", Text(LONG + "x", 0, 32)),
            ("rows.jsonl, line 1", Text(LONG + "x", 31, 63)),
            ("rows.jsonl, line 1", Text(LONG + "x", 62, 74)),
            ("rows.jsonl, line 2", Text("a")),
        ],
        {"split": 1},
        model="v3",
    ),
    Case(
        "a conversation that is too long, dropped",
        {
            "rows.jsonl": files.jsonl(
                {"messages": [user("x" * 99), assistant("y")]}, {"messages": [user("x"), assistant("y")]}
            )
        },
        {"format": "messages", "seq_len": 64},
        [("rows.jsonl, line 2", Chat([user("x"), assistant("y")]))],
        {"dropped: too long": 1},
    ),
    Case(
        "an error where something is too long",
        {"rows.jsonl": files.jsonl({"text": LONG + "x"}, {"text": "a"})},
        TEXT | {"seq_len": 32, "too_long": "error"},
        refusal=(
            "{dir}/rows.jsonl, line 1: has 74 tokens, more than data.seq_len, 32; raise it, or set data.too_long",
        ),
        model="v3",
    ),
]

PAIRS = {"format": "prompt_completion"}
COMPLETIONS = [
    Case(
        "prompt and completion: Alpaca's rendering",
        {
            "rows.jsonl": files.jsonl(
                {"prompt": "### Instruction:\nAdd.\n\n### Response:\n", "completion": "4"},
                {"prompt": "### Instruction:\nAdd.\n\n### Response:", "completion": " é\n"},
            )
        },
        PAIRS,
        at(
            LINE,
            Completion("### Instruction:\nAdd.\n\n### Response:\n", "4"),
            Completion("### Instruction:\nAdd.\n\n### Response:", " é\n"),
        ),
        model="v3",
    ),
    Case(
        "prompt and completion: control tokens in both",
        {
            "rows.jsonl": files.jsonl(
                {"prompt": "<s>[INST] 2 + 2?[/INST]", "completion": " 4</s>"},
                {"prompt": "[INST] 2 + 2?[/INST]", "completion": " 4"},
            )
        },
        PAIRS,
        at(LINE, Completion("<s>[INST] 2 + 2?[/INST]", " 4</s>"), Completion("[INST] 2 + 2?[/INST]", " 4")),
        {PARSED: 2},
        model="v3",
    ),
    Case(
        "prompt and completion: other names, an empty completion, an empty prompt",
        {
            "rows.csv": files.table(
                {"source": "2 + 2 =", "target": " 4"},
                {"source": "3 + 3 =", "target": ""},
                {"source": "", "target": "a"},
            )
        },
        PAIRS | {"columns": {"prompt": "source", "completion": "target"}},
        [("rows.csv, line 2", Completion("2 + 2 =", " 4")), ("rows.csv, line 4", Completion("", "a"))],
        {"dropped: empty response": 1},
        model="v3",
    ),
]

CASES = [*RENDERED, *LENGTHS, *COMPLETIONS]
