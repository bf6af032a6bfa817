"""Log-likelihood requests per second, minorca beside lm_eval's hf class: python -m benchmarks.evaluate

Both score the same random ids of multiple-choice questions with four choices, by the same weights and in the same
precision; in fp32 their log-likelihoods must agree. lm_eval takes --batch requests at a time. Rounds alternate; the
median is over rounds. The rows: long contexts, short ones, and short ones after the same few-shot examples.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import clock, model_under_test, parser, peer, report, spread
from minorca.evaluate.scoring import Request, Scorer, build_trie
from minorca.model.build import prepack

# tokens of what all questions begin with, of a question and of a choice, and how many questions there are
KINDS = {
    "long contexts": (1, (350, 450), (5, 20), 8),
    "short contexts": (1, (20, 60), (3, 15), 32),
    "few-shot": (400, (20, 60), (3, 15), 16),
}
CHOICES = 4
# of log-likelihoods in fp32, relative; random texts are as unlikely as can be
TOLERANCE = 1e-4


def draw_requests(kind: str, vocabulary: int) -> list[Request]:
    random = np.random.default_rng(0)
    beginning, question, choice, count = KINDS[kind]

    def ids(length: int) -> list[int]:
        return random.integers(vocabulary, size=length).tolist()

    shared = ids(beginning)
    contexts = [shared + ids(int(random.integers(*question))) for _ in range(count)]
    return [(context, ids(int(random.integers(*choice)))) for context in contexts for _ in range(CHOICES)]


def measure(args: argparse.Namespace) -> list[dict]:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    rows = []
    with model_under_test(args) as (directory, model):
        # its decorator hides its parameters from type checkers
        hf_class: Any = HFLM
        theirs = hf_class(
            peer(directory, model), tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=args.batch
        )
        # as the command does
        scorer = Scorer(prepack(model.eval()))
        for kind in KINDS:
            requests = draw_requests(kind, model.arch.vocab_size)
            as_theirs = [((None, None), list(context), list(continuation)) for context, continuation in requests]
            runs: dict[str, Callable[[], list]] = {
                "ours": lambda requests=requests: scorer.score(requests),
                "theirs": lambda request=as_theirs: theirs._loglikelihood_tokens(request, disable_tqdm=True),
            }
            seconds, scores = {name: [] for name in runs}, {}
            for _ in range(args.rounds):
                for name, run in runs.items():
                    start = clock()
                    scores[name] = run()
                    seconds[name].append(clock() - start)
            away = max(abs(a[0] / b[0] - 1) for a, b in zip(*scores.values()))
            if args.dtype == "float32" and not away <= TOLERANCE:
                raise SystemExit(f"benchmarks.evaluate: error: {kind}: log-likelihoods differ by up to {away:.1e}")
            row = {"kind": kind, "requests": len(requests), "largest_difference": away}
            row["tokens"] = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
            row["computed_tokens"] = len(build_trie(requests).tokens)
            for name, of_runs in seconds.items():
                row[name] = {
                    "seconds": spread(of_runs),
                    "requests_per_second": len(requests) / statistics.median(of_runs),
                }
            row["ratio"] = row["ours"]["requests_per_second"] / row["theirs"]["requests_per_second"]
            rows.append(row)
    return rows


def main() -> None:
    options = parser("benchmarks.evaluate", "Scoring multiple-choice questions, minorca beside lm_eval's hf class.")
    options.add_argument("--rounds", type=int, default=3, metavar="N", help="of each kind; default: 3")
    options.add_argument("--batch", type=int, default=8, metavar="N", help="requests of a batch of lm_eval; default: 8")
    args = options.parse_args()
    settings = {"model": args.shape or args.model.name, "dtype": args.dtype, "layers": args.layers, "batch": args.batch}
    report({**settings, "rows": measure(args)}, "evaluate", args.output)


if __name__ == "__main__":
    main()
