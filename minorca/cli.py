"""How every command parses its arguments, and how it ends.

Exit status: 0 done; 2 for what the user can fix, with a line for each problem on standard error; after a signal 128 and
its number: 130 SIGINT, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1, 140 SIGUSR2, 152 SIGXCPU.
"""

import argparse
import dataclasses
import os
import signal
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from minorca.config import Config, Source, default_of, fields
from minorca.config_file import load_yaml, read_config, suggestion
from minorca.errors import MACHINE_ERRORS, RunEnded, UserError, nearest, one_line, raise_problems
from minorca.signals import STOPPING, Terminated, raise_when_stopped
from minorca.streams import end_line, flush_output, is_of_output, open_streams, outlive_readers


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `UserError`s, so that they too are one line and exit status 2."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args=None, namespace=None):
        found, surplus = self.parse_known_args(args, namespace)
        raise_problems(_unknown_options(self, surplus, lambda name: ""))
        return found

    def exit(self, status: int = 0, message: str | None = None):
        # the help, while `run` can still see that nobody reads it
        sys.stdout.flush()
        super().exit(status, message)


def parser_of_commands(prog: str, description: str, commands: Mapping[str, Parser]) -> Parser:
    """One parser of several commands, for the completion of command lines; each command parses its own."""
    parser = Parser(prog=prog, description=description)
    names = parser.add_subparsers()
    for name, command in commands.items():
        about = command.description
        names.add_parser(name, parents=[command], add_help=False, description=about, help=about)
    return parser


def add_quantization(parser: Parser, help: str) -> None:
    """Adds the options `--quantize` and `--no-double-quant`, which `parse_quantization` reads."""
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none", help=help)
    parser.add_argument(
        "--no-double-quant", dest="double_quant", action="store_false", help="of nf4: the scales stay in fp32"
    )


# -------------------------------------------------------------------------------------------------- settings of a run


def config_parser(prog: str, description: str) -> Parser:
    """A parser of `--config FILE` and one `--section.key VALUE` a setting; commands may add their own options to it."""
    usage = f"{prog} [--config FILE] [--section.key VALUE ...]"
    parser = Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    help = "a YAML file of these settings, which options override; all others have the defaults below"
    parser.add_argument("--config", metavar="FILE", help=help)
    add_settings(parser)
    return parser


def add_settings(parser: Parser, only: Collection[str] | None = None) -> None:
    """Adds an option for every setting, or for `only` these; `given_settings` reads them."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for section, key, hint in fields():
        if only is not None and f"{section}.{key.name}" not in only:
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        kind, description = typing.get_args(hint)
        choices = [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
        value = default_of(key)
        default = "" if value is dataclasses.MISSING else f" (default: {value})"
        groups[section].add_argument(
            f"--{section}.{key.name}",
            default=argparse.SUPPRESS,
            type=_option_reader(kind),
            metavar="|".join(choices) or "VALUE",
            help=description if only is not None else description + default,
        )


def given_settings(args: argparse.Namespace) -> dict[str, object]:
    """section.key -> value, of the options of `add_settings` that were given."""
    return {option: value for option, value in vars(args).items() if "." in option}


def parse_config(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """The arguments of a `config_parser`, and the settings that they give.

    Raises:
        UserError: every unknown option, and whatever is wrong with the settings.
    """
    args, surplus = parser.parse_known_args(argv)
    path = Path(args.config) if args.config else None
    return args, read_config(path, given_settings(args), _unknown_options(parser, surplus, suggestion))


def _unknown_options(parser: Parser, surplus: list[str], suggest: Callable[[str], str]) -> Iterator[UserError]:
    """suggest: gives the hint for an option that may be a setting."""
    known = [option for action in parser._actions for option in action.option_strings]
    after_option = False
    for word in surplus:
        if word.startswith("--"):
            name = word.partition("=")[0]
            hint = suggest(name[2:]) or nearest(name, known)
            yield UserError(f"is an unknown option{hint} (see {parser.prog} --help)", field=name)
        elif not after_option:
            yield UserError(f"unexpected argument {word} (see {parser.prog} --help)")
        # the word after an unknown option is its value
        after_option = word.startswith("--") and "=" not in word


def _option_reader(kind) -> Callable[[str], object]:
    """How an option's text becomes a value of `kind`: as YAML, but where only text is wanted as it stands (007 is a
    name).
    """
    import yaml

    def read(text: str):
        try:
            return load_yaml(text)
        # a path that starts with [ or @; where no text is wanted, the check of types says so
        except yaml.YAMLError:
            return text

    def read_sources(text: str):
        value = read(text)
        if not isinstance(value, list) and text.lstrip().startswith(("[", "{")) and not Path(text).exists():
            expected = "a path, a hub id or a list [FILE, {path: FILE, format: NAME, weight: NUMBER}, ...]"
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value if isinstance(value, list) else text

    def read_text_or_null(text: str):
        return None if text == "null" else text

    readers = {str: str, str | None: read_text_or_null, str | list[str | Source]: read_sources}
    return readers.get(kind, read)


# ------------------------------------------------------------------------------------------------------------- ending


def _exit(status: int) -> None:
    # gloo's threads may abort a process that ends as Python does (pytorch#190489)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _print_problems(error: UserError) -> None:
    end_line()
    for problem in error.problems:
        print(f"minorca: error: {one_line(str(problem))}", file=sys.stderr)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command's `main` and turns the ways it can end into exit statuses."""
    raise_when_stopped()
    open_streams()
    status = 0
    try:
        main(sys.argv[1:] if argv is None else argv)
        flush_output()
    except UserError as error:
        _print_problems(error)
        status = 2
    except RunEnded as ended:
        if str(ended):
            end_line()
            print(f"minorca: {one_line(str(ended))}", file=sys.stderr)
        status = ended.status
    except KeyboardInterrupt:
        status = 130
    except Terminated as terminated:
        status = 128 + terminated.signum
    except OSError as error:
        if not is_of_output(error) and error.errno not in MACHINE_ERRORS:
            raise
        # or the reader of our output has gone (`| head`): nobody is left to tell
        if not isinstance(error, BrokenPipeError):
            output = f"standard output cannot be written ({error.strerror})"
            _print_problems(UserError(output if is_of_output(error) else str(error)))
            status = 2
    # or Python complains on its way out of what cannot be written
    outlive_readers()
    if status > 128:
        # another signal must not change how the process ends
        for signum in (signal.SIGINT, *STOPPING):
            signal.signal(signum, signal.SIG_IGN)
    _exit(status)
