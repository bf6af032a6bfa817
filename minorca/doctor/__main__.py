"""`python -m minorca.doctor`: what this machine will do, and what to change."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from minorca import cli
from minorca.doctor import accelerator, machine
from minorca.doctor.findings import Check, Fact, Finding, run_apart
from minorca.errors import UserError, raise_problems

CHECKS: list[Check] = [
    machine.python,
    machine.optional_packages,
    machine.host,
    machine.shared_memory,
    machine.disks,
    machine.compilers,
    accelerator.imports,
    accelerator.devices,
    accelerator.back_ends,
    accelerator.ranks,
]
# the first launch of a kernel compiles it
TIMEOUT = 300


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.doctor",
        description="Checks what training and generation need of this machine, and says what to change. Exit status 2: "
        "something prevents them.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    found = run_apart(CHECKS, TIMEOUT)
    findings = print_json(list(found)) if args.json else print_lines(found)
    raise_problems(UserError(str(finding)) for finding in findings if finding.prevents)


def print_json(found: list[Fact | Finding]) -> list[Finding]:
    """Prints everything as one object; returns the findings."""
    sections: dict[str, dict[str, str]] = {}
    findings = [item for item in found if isinstance(item, Finding)]
    for fact in found:
        if isinstance(fact, Fact):
            sections.setdefault(fact.section, {})[fact.name] = fact.value
    can_run = not any(finding.prevents for finding in findings)
    print(json.dumps({"can_run": can_run, "sections": sections, "findings": list(map(asdict, findings))}))
    return findings


def print_lines(found: Iterator[Fact | Finding]) -> list[Finding]:
    """Prints each fact as soon as it is known, then the findings; returns these."""
    section, findings = "", []
    for item in found:
        if isinstance(item, Finding):
            findings.append(item)
            continue
        if item.section != section:
            print(item.section)
            section = item.section
        print(f"  {item.name:28} {item.value}", flush=True)
    print("what to change")
    for finding in findings:
        print("\n    ".join(filter(None, (f"  {finding.message}", finding.remedy))))
    if not findings:
        print("  nothing")
    return findings


if __name__ == "__main__":
    cli.run(main)
