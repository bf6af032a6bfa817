"""Every format in every kind of file."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.corpus import files
from tests.corpus.case import MESSAGES, Case, Chat, Completion, Row, Text, assistant, at, system, user

QUOTES = 'Say "2 + 2", then the sum; é 日本 🦜'
BRIEF = [system("Be brief."), user(QUOTES), assistant("4, \\ 'four'")]
TWO_TURNS = [user("Hi"), assistant("Hello"), user("Bye"), assistant(" See you ")]
TWO_CHATS = [Chat(BRIEF), Chat(TWO_TURNS)]


class Rows(NamedTuple):
    """Records of a format, and what they are.

    Attributes:
        model: the model that reads them.
    """

    records: list[dict]
    expected: Sequence[Row]
    model: str = "jinja"


FORMATS = {
    "openorca": Rows(
        [
            {"id": "flan.1", "system_prompt": "Be brief.", "question": QUOTES, "response": "4, \\ 'four'"},
            {"id": "t0.2", "system_prompt": "", "question": "Hi", "response": "Hello"},
        ],
        [Chat(BRIEF), Chat(TWO_TURNS[:2])],
    ),
    "sharegpt": Rows(
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": QUOTES},
                    {"from": "gpt", "value": "4, \\ 'four'"},
                ]
            },
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "human", "value": "Bye"},
                    {"from": "gpt", "value": " See you "},
                ]
            },
        ],
        TWO_CHATS,
    ),
    "messages": Rows([{"messages": BRIEF}, {"messages": TWO_TURNS}], TWO_CHATS),
    "alpaca": Rows(
        [
            {"instruction": "Add.", "input": "2 and 2", "output": "4"},
            {"instruction": QUOTES, "input": "", "output": "Hello"},
        ],
        [Chat([user("Add.\n\n2 and 2"), assistant("4")]), Chat([user(QUOTES), assistant("Hello")])],
    ),
    "prompt_completion": Rows(
        [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": QUOTES, "completion": "\nfour"}],
        [Completion("2 + 2 =", " 4"), Completion(QUOTES, "\nfour")],
        "v3",
    ),
    "text": Rows(
        [{"text": "Once upon a time"}, {"text": f"  {QUOTES}"}], [Text("Once upon a time"), Text(f"  {QUOTES}")], "v3"
    ),
}


class Kind(NamedTuple):
    """A kind of file: how it is written, what it is called, and the place of its first row."""

    name: str
    write: Callable
    unit: str = "line"
    first: int = 1
    found: str | None = None


KINDS = [
    Kind("rows.jsonl", files.jsonl),
    Kind("rows.json", files.array, first=2),
    Kind("lines.json", files.jsonl),
    Kind("rows.jsonl.gz", lambda *records: files.gz(files.jsonl(*records))),
    Kind("rows.jsonl.zst", lambda *records: files.zst(files.jsonl(*records))),
    Kind("rows.json.gz", lambda *records: files.gz(files.array(*records)), first=2),
    Kind("rows.csv", files.table, first=2),
    Kind("rows.tsv", files.tsv, first=2),
    Kind("rows.csv.zst", lambda *records: files.zst(files.table(*records)), first=2),
    Kind("rows.parquet", files.parquet, "row"),
    Kind("file.arrow", files.arrow_file, "row"),
    Kind("stream.arrow", files.arrow_stream, "row"),
    Kind("saved", files.saved, "row", found="saved/data-00000-of-00001.arrow"),
]

CASES = [
    Case(
        f"{format} in {kind.name}",
        {kind.name: kind.write(*rows.records)},
        {"format": format},
        at(f"{kind.found or kind.name}, {kind.unit}", *rows.expected, first=kind.first),
        model=rows.model,
    )
    for format, rows in FORMATS.items()
    for kind in KINDS
]

ONE, TWO = FORMATS["messages"].records
FIRST, SECOND = FORMATS["messages"].expected

CASES += [
    Case(
        "two text documents",
        {"docs/a.txt": "First é\n\nline\n".encode(), "docs/b.txt": b"\xef\xbb\xbfSecond\r\n"},
        {"format": "text", "train": "docs"},
        [("docs/a.txt, document 1", Text("First é\n\nline\n")), ("docs/b.txt, document 1", Text("Second\r\n"))],
        model="v3",
    ),
    Case(
        "a compressed document",
        {"a.txt.gz": files.gz(b"Once")},
        {"format": "text"},
        [("a.txt.gz, document 1", Text("Once"))],
        model="v3",
    ),
    Case(
        "a saved data set's split",
        {"saved": files.saved_splits(train=[ONE], test=[TWO])},
        MESSAGES | {"train": [{"path": "saved", "split": "test"}]},
        [("saved/test/data-00000-of-00001.arrow, row 1", SECOND)],
    ),
    Case(
        "a saved data set without a split",
        {"saved": files.saved_splits(train=[ONE], test=[TWO])},
        MESSAGES,
        refusal=("{dir}/saved: split is missing; expected one of train, test",),
    ),
    Case(
        "a directory with other files",
        {
            "rows/b.jsonl": files.jsonl(TWO),
            "rows/a/a.parquet": files.parquet(ONE),
            "rows/README.md": b"# Rows",
            "rows/LICENSE.txt": b"MIT",
            "rows/.hidden.jsonl": b"{",
        },
        MESSAGES | {"train": "rows"},
        [("rows/a/a.parquet, row 1", FIRST), ("rows/b.jsonl, line 1", SECOND)],
    ),
    Case(
        "a directory of a hub data set's shards",
        {
            "data/train-00000-of-00002.parquet": files.parquet(ONE),
            "data/train-00001-of-00002.parquet": files.parquet(TWO),
            "data/test-00000-of-00001.parquet": files.parquet(TWO),
        },
        MESSAGES | {"train": [{"path": "data", "split": "train"}]},
        [
            ("data/train-00000-of-00002.parquet, row 1", FIRST),
            ("data/train-00001-of-00002.parquet, row 1", SECOND),
        ],
    ),
    Case(
        "a directory of shards without a split",
        {"data/train-00000-of-00001.parquet": files.parquet(ONE), "data/test-00000-of-00001.parquet": b""},
        MESSAGES | {"train": "data"},
        refusal=("{dir}/data: split is missing; expected one of test, train",),
    ),
    Case(
        "a glob",
        {"part-2.jsonl": files.jsonl(TWO), "part-1.jsonl.gz": files.gz(files.jsonl(ONE)), "other.jsonl": b"{"},
        MESSAGES | {"train": "part-*"},
        [("part-1.jsonl.gz, line 1", FIRST), ("part-2.jsonl, line 1", SECOND)],
    ),
    Case(
        "a glob over directories",
        {"a/b/rows.jsonl": files.jsonl(ONE), "c/rows.csv": files.table(TWO)},
        MESSAGES | {"train": "**/rows.*"},
        [("a/b/rows.jsonl, line 1", FIRST), ("c/rows.csv, line 2", SECOND)],
    ),
    Case(
        "a list of paths and dictionaries",
        {
            "a.jsonl": files.jsonl(ONE),
            "b.csv": files.table(*FORMATS["openorca"].records),
            "c.jsonl": files.jsonl({"q": "Hi", "a": "Hello"}),
        },
        {
            "format": "messages",
            "train": [
                "a.jsonl",
                {"path": "b.csv", "format": "openorca", "weight": 0.5},
                {"path": "c.jsonl", "format": "alpaca", "columns": {"instruction": "q", "output": "a"}},
            ],
        },
        [
            ("a.jsonl, line 1", FIRST),
            *at("b.csv, line", *FORMATS["openorca"].expected, first=2),
            ("c.jsonl, line 1", Chat(TWO_TURNS[:2])),
        ],
    ),
    Case(
        "at most one row of each source",
        {"a.jsonl": files.jsonl(ONE, TWO), "b.jsonl": files.jsonl(TWO, "{")},
        MESSAGES | {"train": ["a.jsonl", "b.jsonl"], "limit": 1},
        [("a.jsonl, line 1", FIRST), ("b.jsonl, line 1", SECOND)],
    ),
    Case(
        "two compressed files in one",
        {"rows.jsonl.gz": files.gz(files.jsonl(ONE)) + files.gz(files.jsonl(TWO))},
        MESSAGES,
        at("rows.jsonl.gz, line", FIRST, SECOND),
    ),
    Case(
        "a byte order mark, CRLF and blank lines",
        {"rows.jsonl": b"\xef\xbb\xbf\r\n" + files.jsonl(ONE, "   ", TWO).replace(b"\n", b"\r\n") + b"\r\n"},
        MESSAGES,
        [("rows.jsonl, line 2", FIRST), ("rows.jsonl, line 4", SECOND)],
    ),
    Case(
        "no line break at the end",
        {"rows.jsonl": files.jsonl(ONE, TWO)[:-1]},
        MESSAGES,
        at("rows.jsonl, line", FIRST, SECOND),
    ),
    Case(
        "line breaks in the cells of a spreadsheet",
        {"rows.csv": b'\xef\xbb\xbfinstruction,output\r\n"a\r\nb","c\nd"\r\n\r\ne,"say ""f"""\r\n'},
        {"format": "alpaca"},
        [
            ("rows.csv, line 2", Chat([user("a\r\nb"), assistant("c\nd")])),
            ("rows.csv, line 6", Chat([user("e"), assistant('say "f"')])),
        ],
    ),
    Case(
        "line separators of Unicode",
        {"rows.jsonl": files.jsonl({"instruction": "a\u2028b\u2029\x85c", "output": "\u2028\x0c"})},
        {"format": "alpaca"},
        refusal=("{dir}/rows.jsonl: no row is left to use (1 read, 1 dropped: empty response)",),
    ),
    Case(
        "line separators of Unicode in an answer",
        {"rows.jsonl": files.jsonl({"instruction": "a\u2028b\u2029\x85c", "output": "x\u2028y\x0cz"})},
        {"format": "alpaca"},
        at("rows.jsonl, line", Chat([user("a\u2028b\u2029\x85c"), assistant("x\u2028y\x0cz")])),
    ),
]
