"""`python -m minorca.data`: `show` prints rows as they are trained on, `prepare` renders all into the token store."""

import logging
import sys
from collections import Counter

import numpy as np

from minorca import cli
from minorca.config import DataConfig
from minorca.data.conversation import Conversation, is_trained_answer
from minorca.data.new_tokens import training_tokenizer
from minorca.data.prepare import prepare_store
from minorca.data.rendering import Outcome, decide
from minorca.data.row_files import RowError
from minorca.data.sources import Row, open_source, read_rows
from minorca.data.tally import Tally, raise_errors
from minorca.data.tokenizer import Tokenizer
from minorca.data.visible_text import branch_headings, marked_text
from minorca.errors import UserError


def _show_parser() -> cli.Parser:
    description = (
        "Prints rows as they are trained, and those that are not, with the reason. «Trained» tokens are marked (on a "
        "terminal, in green). Control tokens are spelled out; text that only spells one has a backslash before it."
    )
    parser = cli.config_parser("minorca.data show", description)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print, of each source (default: 3)")
    return parser


def show(argv: list[str]) -> None:
    args, config = cli.parse_config(_show_parser(), argv)
    if args.rows < 1:
        raise UserError(f"is {args.rows}; expected at least 1", field="--rows")
    tok, template = training_tokenizer(config)
    tally = Tally()
    decided = []
    for source in config.data.sources(config.data.train):
        # What reading ignored or changed in the current row.
        counts = Counter()
        for row in read_rows(open_source(source, args.rows), args.rows, counts):
            outcome = decide(row, tok, config.data, template)
            outcome.notes += sorted((+counts).keys() - {"read"})
            counts.clear()
            decided.append((row, outcome))
            if outcome.error and not outcome.dropped:
                tally.add_error(outcome.error)
    raise_errors([tally])
    for row, outcome in decided:
        print(f"--- {row.path}, {row.where}: {_describe(row, outcome, template, config.data)}")
        if len(outcome.ids):
            print(_text_with_cuts(tok, outcome, config.data.seq_len))


def _describe(row: Row | RowError, outcome: Outcome, template: str, data: DataConfig) -> str:
    """What becomes of a row, in a line."""
    count = len(outcome.ids)
    limit = f"{count} tokens, data.seq_len is {data.seq_len}"
    if outcome.error:
        return f"dropped: {outcome.error.sentence}"
    if outcome.dropped == "too long":
        return f"dropped: too long: {limit}"
    if outcome.dropped or isinstance(row, RowError):
        return f"dropped: {outcome.dropped}"
    trained = sum(int(outcome.trained[start + 1 : end].sum()) for start, end in outcome.pieces)
    writer = "plain text" if isinstance(row.content, str) else f"template {template}"
    parts = [writer, f"{count} tokens", f"{trained} trained"]
    if outcome.branch_starts:
        parts.append(f"{outcome.branch_starts[0]} in the prompt")
    if len(outcome.pieces) > 1:
        parts.append(f"split into {len(outcome.pieces)} rows")
    elif outcome.pieces[0][1] < count:
        parts.append(f"truncated to data.seq_len, {data.seq_len}")
    if outcome.empty_answers:
        parts.append(f"empty answers dropped with their questions: {outcome.empty_answers}")
    messages = row.content.messages if isinstance(row.content, Conversation) and data.train_on != "all" else []
    if excluded := sum(message["role"] == "assistant" and not is_trained_answer(message) for message in messages):
        parts.append(f"answers excluded by weight: {excluded}")
    return ", ".join([*parts, *outcome.notes])


def _text_with_cuts(tok: Tokenizer, outcome: Outcome, seq_len: int) -> str:
    """A row's text with what is trained of it marked, headings over its branches, and the places where it is cut."""
    count = len(outcome.ids)
    trained = np.zeros(count, bool)
    # Neither of a tie is better, and of identical answers one is shown.
    scores = None if outcome.dropped else outcome.branch_scores
    cuts = branch_headings(outcome.branch_starts, scores, outcome.trained)
    # Pieces overlap by a token: what starts at a piece's second token is what follows the cut.
    for start, end in outcome.pieces:
        trained[start + 1 : end] = outcome.trained[start + 1 : end]
        if end < count:
            cuts[end] = "\n[cut here: a row ends, and the next starts with its last token]\n"
    if outcome.pieces and outcome.pieces[-1][1] < count:
        end = outcome.pieces[-1][1]
        cuts[end] = f"\n[cut here: data.seq_len is {seq_len}, and the {count - end} tokens below are not used]\n"
    return marked_text(tok, outcome.ids, trained, cuts)


def _prepare_parser() -> cli.Parser:
    description = "Renders data.train and data.eval into the token store, where training finds them."
    return cli.config_parser("minorca.data prepare", description)


def prepare(argv: list[str]) -> None:
    _, config = cli.parse_config(_prepare_parser(), argv)
    cli.outlive_readers()
    tok, template = training_tokenizer(config)
    for setting in (config.data.train, config.data.eval):
        if sources := config.data.sources(setting):
            store = prepare_store(sources, tok, template, config.data)
            store.report()
            print(f"{len(store)} rows in {store.path}")


def build_parser() -> cli.Parser:
    description = "Prints rows as they are trained, or renders all of them."
    return cli.parser_of_commands("minorca.data", description, {"show": _show_parser(), "prepare": _prepare_parser()})


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("minorca").setLevel(logging.INFO)
    commands = {"show": show, "prepare": prepare}
    if argv[:1] in (["-h"], ["--help"]):
        print(
            f"usage: minorca.data {{{','.join(commands)}}} [--config FILE] [--section.key VALUE ...]   (--help on each)"
        )
    elif not argv or argv[0] not in commands:
        raise UserError(f"minorca.data takes a command: {', '.join(commands)}")
    else:
        commands[argv[0]](argv[1:])


if __name__ == "__main__":
    cli.run(main)
