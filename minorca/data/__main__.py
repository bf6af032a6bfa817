"""`python -m minorca.data show`: rows as they are trained on, the trained tokens marked."""

import sys
from itertools import groupby

from minorca import cli
from minorca.chat import resolve_template
from minorca.config import config_parser, read_config
from minorca.data.sources import read_rows
from minorca.data.store import render_row
from minorca.errors import UserError
from minorca.tokenizer import Tokenizer, load_tokenizer


def show(argv: list[str]) -> None:
    parser = config_parser("minorca.data show", "Prints rendered rows; «trained» tokens are marked (on a terminal, in green).")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print (default: 3)")
    args, surplus = parser.parse_known_args(argv)
    if args.rows < 1:
        raise UserError(f"--rows is {args.rows}; expected at least 1")
    config = read_config(args, surplus)
    tok = load_tokenizer(config.model.path)
    template = resolve_template(tok, config.data.template)
    start, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    for row in read_rows(config.data.train, args.rows):
        ids, trained = render_row(row, tok, template, config.data.train_on)
        print(f"--- {row.where}: template {template}, {len(ids)} tokens, {trained.sum()} trained")
        edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
        for first, last in zip(edges, edges[1:]):
            text = visible_text(tok, ids[first:last].tolist())
            print(f"{start}{text}{end}" if trained[first] else text, end="")
        print()


def visible_text(tok: Tokenizer, ids: list[int]) -> str:
    """The text of ids with control tokens spelled out."""
    names = {i: name for name, i in tok.control_ids.items()}
    runs = groupby(ids, key=lambda i: i in names)
    return "".join("".join(names[i] for i in run) if control else tok.decode(list(run)) for control, run in runs)


def main(argv: list[str]) -> None:
    commands = {"show": show}
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: minorca.data show [--config FILE] [--section.key VALUE ...] [--rows N]")
    elif not argv or argv[0] not in commands:
        raise UserError(f"minorca.data takes a command: {', '.join(commands)}")
    else:
        commands[argv[0]](argv[1:])


if __name__ == "__main__":
    cli.run(main)
