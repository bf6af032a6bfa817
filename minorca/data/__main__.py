"""`python -m minorca.data`: `show` prints rows as they are trained on, `prepare` renders all into the token store."""

import logging
import sys
from collections import Counter
from itertools import groupby

from minorca import cli
from minorca.config import Config
from minorca.data.chat_template import resolve_template
from minorca.data.prepare import prepare_store
from minorca.data.rendering import render_row
from minorca.data.sources import open_source, read_rows
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.errors import UserError


def _tokenizer(config: Config) -> tuple[Tokenizer, str]:
    """The model's tokenizer, and the name of the template that writes its rows."""
    tok = load_tokenizer(config.model.path)
    return tok, resolve_template(tok, config.data.template)


def show(argv: list[str]) -> None:
    parser = cli.config_parser(
        "minorca.data show", "Prints rendered rows; «trained» tokens are marked (on a terminal, in green)."
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print, of each source (default: 3)")
    args, config = cli.parse_config(parser, argv)
    if args.rows < 1:
        raise UserError(f"is {args.rows}; expected at least 1", field="--rows")
    tok, template = _tokenizer(config)
    mark_start, mark_end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    for source in config.data.sources(config.data.train):
        for row in read_rows(open_source(source, args.rows), args.rows, Counter()):
            ids, trained = render_row(row, tok, template, config.data.train_on, config.data.parse_control_tokens)
            writer = "plain text" if isinstance(row.content, str) else f"template {template}"
            print(f"--- {row.path}, {row.where}: {writer}, {len(ids)} tokens, {trained.sum()} trained")
            edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
            for begin, stop in zip(edges, edges[1:]):
                text = visible_text(tok, ids[begin:stop].tolist())
                print(f"{mark_start}{text}{mark_end}" if trained[begin] else text, end="")
            print()


def prepare(argv: list[str]) -> None:
    parser = cli.config_parser(
        "minorca.data prepare", "Renders data.train and data.eval into the token store, where training finds them."
    )
    _, config = cli.parse_config(parser, argv)
    tok, template = _tokenizer(config)
    for setting in (config.data.train, config.data.eval):
        if sources := config.data.sources(setting):
            store = prepare_store(sources, tok, template, config.data)
            store.report()
            print(f"{len(store)} rows in {store.path}")


def visible_text(tok: Tokenizer, ids: list[int]) -> str:
    """The text of ids, with control tokens shown as their strings."""
    names = {i: name for name, i in tok.control_ids.items()}
    runs = groupby(ids, key=lambda i: i in names)
    return "".join("".join(names[i] for i in run) if control else tok.decode(list(run)) for control, run in runs)


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
