"""Files that cannot be read, whole or in part, and the words of their refusal."""

import gzip
import json

from tests.corpus import files
from tests.corpus.case import MESSAGES, Case, assistant, refused, user

GOOD = {"messages": [user("Hi"), assistant("Hello")]}
ALPACA = {"format": "alpaca"}

JSON = [
    refused(
        "JSON that is cut",
        files.jsonl(GOOD, json.dumps(GOOD)[:-9]),
        ", line 2: not valid JSON (Unterminated string starting at, column 83)",
    ),
    refused(
        "several lines that are not JSON",
        files.jsonl("{", GOOD, "", "[]", "null", "{'a': 1}"),
        ", line 1: not valid JSON (Expecting property name enclosed in double quotes, column 2)",
        ", line 6: not valid JSON (Expecting property name enclosed in double quotes, column 2)",
        ", line 4: expected an object with columns, got list",
        ", line 5: expected an object with columns, got null",
    ),
    refused(
        "NaN",
        files.jsonl('{"messages": NaN}'),
        ", line 1: cannot be read (NaN is not a valid JSON number)",
    ),
    refused(
        "a number that is too large",
        files.jsonl('{"messages": 1e999}'),
        ", line 1: cannot be read (1e999 is not a valid JSON number)",
    ),
    refused(
        "a key that is there twice",
        files.jsonl('{"instruction": "a", "output": "b", "output": "c"}'),
        ", line 1: cannot be read (duplicate key 'output')",
        data=ALPACA,
    ),
    refused(
        "an array that is not closed",
        files.array(GOOD)[:-3],
        ", line 2: not valid JSON (the array is not closed)",
        file="rows.json",
    ),
    refused(
        "an array with a comma at its end",
        files.array(GOOD)[:-3] + b",\n]",
        ", line 3: not valid JSON (Expecting value)",
        file="rows.json",
    ),
    refused(
        "an unpaired surrogate",
        files.jsonl('{"instruction": "a\\ud83e", "output": "b"}'),
        ", line 1: instruction is not valid UTF-8 or has an unpaired surrogate; fix or remove the row",
        data=ALPACA,
    ),
    refused(
        "a number of too many digits",
        files.jsonl('{"messages": ' + "9" * 5000 + "}"),
        ", line 1: cannot be read (...)",
    ),
    refused(
        "brackets nested too deeply",
        files.jsonl('{"messages": ' + "[" * 100_000 + "}"),
        ", line 1: cannot be read (...)",
    ),
    refused(
        "an unpaired surrogate in a chat",
        files.jsonl('{"messages": [{"role": "user", "content": "\\udc00"}]}'),
        ", line 1: messages[0].content is not valid UTF-8 or has an unpaired surrogate; fix or remove the row",
    ),
    refused(
        "another encoding",
        files.jsonl({"instruction": "é", "output": "b"}).decode().encode("latin-1"),
        ", line 1: instruction is not valid UTF-8 or has an unpaired surrogate; fix or remove the row",
        data=ALPACA,
    ),
]

FILES = [
    refused("an empty file", b"", ": no row is left to use (the source is empty)"),
    refused("an empty array", b"[]", ": no row is left to use (the source is empty)", file="rows.json"),
    refused("a table of a header", b"messages\n", ": no row is left to use (the source is empty)", file="rows.csv"),
    refused(
        "gzip that is cut",
        gzip.compress(files.jsonl(GOOD))[:-12],
        ": cannot be read (...)",
        file="rows.jsonl.gz",
    ),
    refused(
        "gzip that is none",
        files.jsonl(GOOD),
        ": cannot be read (...)",
        file="rows.jsonl.gz",
    ),
    refused("parquet that is none", b"PAR1", ": cannot be read as parquet (...)", file="rows.parquet"),
    refused("Arrow that is none", b"x" * 50, ": cannot be read as Arrow (...)", file="rows.arrow"),
    refused(
        "another kind of file",
        b"",
        ": expected a name ending in .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow, or all but the last two with "
        ".gz or .zst",
        file="rows.xlsx",
    ),
    Case(
        "a directory without rows",
        {"rows/README.md": b"", "rows/notes.txt": b"a"},
        MESSAGES | {"train": "rows"},
        refusal=("{dir}/rows: has no file whose name ends in .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow",),
    ),
    Case(
        "a split that a saved data set does not have",
        {"saved": files.saved_splits(train=[GOOD])},
        MESSAGES | {"train": [{"path": "saved", "split": "valid"}]},
        refusal=("{dir}/saved: split is valid; expected one of train",),
    ),
    Case(
        "a file that is not there",
        {"rows.jsonl": b""},
        MESSAGES | {"train": "row.jsonl"},
        refusal=(
            "{dir}/row.jsonl: no such file; data.train and data.eval take a file, a directory, a glob or a hub id",
        ),
    ),
    Case(
        "a glob that matches nothing",
        {"rows.jsonl": b""},
        MESSAGES | {"train": "*.parquet"},
        refusal=("{dir}/*.parquet: matches no file",),
    ),
    refused(
        "a document as a conversation",
        b"Once",
        ": is plain text, one document, which format messages cannot read; set the format to text",
        file="a.txt",
    ),
    Case(
        "a split of a file",
        {"rows.jsonl": files.jsonl(GOOD)},
        MESSAGES | {"train": [{"path": "rows.jsonl", "split": "train"}]},
        refusal=("{dir}/rows.jsonl: split is train, but a file has none; leave it out",),
    ),
]

TABLES = [
    refused(
        "a cell too many and one too few",
        b"instruction,output\na,b,c\nd\n",
        ", line 2: expected 2 cells as in the header, got 3",
        ", line 3: expected 2 cells as in the header, got 1",
        file="rows.csv",
        data=ALPACA,
    ),
    refused(
        "a quote that is not closed",
        b'instruction,output\na,b\nc,"d\ne,f\n',
        ", line 3: not valid CSV (unexpected end of data) in the row that starts here",
        file="rows.csv",
        data=ALPACA,
    ),
    refused(
        "a column that is there twice",
        b"instruction\toutput\toutput\na\tb\tc\n",
        ", line 1: column output appears twice; rename or remove one",
        file="rows.tsv",
        data=ALPACA,
    ),
    refused(
        "a column that is missing in a table",
        files.parquet({"instruction": "a", "response": "b"}, {"instruction": "a", "response": "b"}),
        ": column output is missing; format alpaca needs the columns instruction, output, got instruction, response; "
        "fix the row, data.format or data.columns",
        file="rows.parquet",
        data=ALPACA,
    ),
    refused(
        "a table with another separator",
        b"instruction;output\na;b\n",
        ": column instruction is missing; format alpaca needs the columns instruction, output, got instruction;output; "
        "fix the row, data.format or data.columns",
        file="rows.csv",
        data=ALPACA,
    ),
    refused(
        "rows of another format",
        files.jsonl(GOOD),
        ", line 1: column instruction is missing; format alpaca needs the columns instruction, output, got messages; "
        "fix the row, data.format or data.columns",
        data=ALPACA,
    ),
    refused(
        "a column that is missing in some lines",
        files.jsonl({"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}),
        ", line 2: column output is missing; format alpaca needs the columns instruction, output, got instruction, "
        "response; fix the row, data.format or data.columns",
        data=ALPACA,
    ),
    refused(
        "a name in columns that no row has",
        files.jsonl({"q": "a", "a": "b"}),
        ": data.columns names sys, which no row has; fix the name",
        data=ALPACA | {"columns": {"instruction": "q", "output": "a", "system": "sys"}},
    ),
    refused(
        "JSON text in a cell that is none",
        b"messages\n[{]\n",
        ", line 2: messages is text that is not JSON (Expecting property name enclosed in double quotes: line 1 column "
        "3 (char 2)); expected a list of {role, content}",
        file="rows.csv",
    ),
    refused(
        "values of other types",
        files.jsonl(
            {"instruction": 7, "output": "b"}, {"instruction": "a", "output": ["b"]}, {"instruction": 8, "output": ""}
        ),
        ", line 1: instruction is int; expected text",
        ", line 3: instruction is int; expected text",
        ", line 2: output is list; expected text",
        data=ALPACA,
    ),
    refused(
        "a history that is none",
        files.jsonl({"instruction": "a", "output": "b", "history": [["q"]]}),
        ", line 1: history[0] is not a list of two; expected a list of [question, answer]",
        data=ALPACA,
    ),
    refused(
        "a prompt of text and a completion of messages",
        files.jsonl({"prompt": "a", "completion": [assistant("b")]}),
        ", line 1: prompt and completion are text and list; expected both text or both lists of messages",
        data={"format": "prompt_completion"},
    ),
]

CASES = [*JSON, *FILES, *TABLES]
