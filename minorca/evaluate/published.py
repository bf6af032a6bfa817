"""Published scores of Mistral-7B-v0.1 and Mistral-7B-OpenOrca, with where they come from.

In percent; MT-Bench from 1 to 10. None of them was measured with this engine.
"""

from typing import NamedTuple

BASE = "Mistral-7B-v0.1"
CARD = "OpenOrca, card"
LATER = "OpenOrca, later"
COLUMNS = (BASE, CARD, LATER)


class Published(NamedTuple):
    """Attributes:
    source: a key of SOURCES.
    note: "derived" by arithmetic from published numbers, "unconfirmed" where we found no source to cite; else empty.
    """

    value: float
    source: str
    note: str = ""


SOURCES = {
    "first card": "the first model card of Mistral-7B-OpenOrca, 2 October 2023 (the final card quotes other numbers)",
    "final card": "the final model card of Mistral-7B-OpenOrca, 5 October 2023",
    "leaderboard": "results of the Hugging Face leaderboard v1, as posted in discussion 18 of Mistral-7B-OpenOrca",
    "re-run": "mlabonne's run of the Nous suite on Mistral-7B-OpenOrca, gist 731e3e55",
    "base": "believed to be Mistral-7B-v0.1 on the Hugging Face leaderboard v1; no source was found to cite",
    "ratio": "the card's score divided by the improvement over the base that the card claims",
}


def _table(column: str, source: str, note: str = "", /, **values: float) -> dict[tuple[str, str], Published]:
    return {(column, name): Published(value, source, note) for name, value in values.items()}


# The names of averages.
FOUR = "mean of ARC, HellaSwag, MMLU and TruthfulQA"
SIX = "mean of all six"
AGIEVAL_MEAN = "mean of acc_norm"
BIGBENCH_MEAN = "mean of multiple_choice_grade"
GPT4ALL_MEAN = "mean of acc_norm, else acc"
MT_BENCH_MEAN = "mean of all judgments"

# By suite: column and the name of a member or an average.
PUBLISHED: dict[str, dict[tuple[str, str], Published]] = {
    "leaderboard-v1": {
        (BASE, FOUR): Published(62.40, "base", "unconfirmed"),
        (BASE, SIX): Published(60.97, "base", "unconfirmed"),
        (CARD, FOUR): Published(65.33, "first card"),
        (LATER, FOUR): Published(65.84, "final card"),
        (LATER, SIX): Published(60.17, "leaderboard", "derived"),
    }
    | _table(
        BASE,
        "base",
        "unconfirmed",
        ARC=59.98,
        HellaSwag=83.31,
        MMLU=64.16,
        TruthfulQA=42.15,
        Winogrande=78.37,
        GSM8K=37.83,
    )
    | _table(CARD, "first card", ARC=63.57, HellaSwag=83.79, MMLU=61.73, TruthfulQA=52.24)
    | _table(LATER, "final card", ARC=64.08, HellaSwag=83.99, MMLU=62.24, TruthfulQA=53.05)
    | _table(LATER, "leaderboard", Winogrande=77.74, GSM8K=19.94),
    "agieval": {
        (BASE, AGIEVAL_MEAN): Published(30.8, "ratio", "derived"),
        (CARD, AGIEVAL_MEAN): Published(39.7, "first card"),
        (LATER, AGIEVAL_MEAN): Published(39.24, "re-run"),
    }
    | {
        (LATER, name): Published(value, "re-run")
        for name, value in {
            "aqua-rat": 26.38,
            "logiqa-en": 33.18,
            "lsat-ar": 25.22,
            "lsat-lr": 38.82,
            "lsat-rc": 51.67,
            "sat-en": 70.39,
            "sat-en-without-passage": 36.89,
            "sat-math": 31.36,
        }.items()
    },
    "bigbench-hard": {
        (BASE, BIGBENCH_MEAN): Published(35.0, "ratio", "derived"),
        (CARD, BIGBENCH_MEAN): Published(41.6, "first card"),
        (LATER, BIGBENCH_MEAN): Published(41.65, "re-run"),
    },
    "gpt4all": {
        (CARD, GPT4ALL_MEAN): Published(72.38, "first card"),
        (LATER, GPT4ALL_MEAN): Published(72.39, "re-run", "derived"),
    }
    | _table(
        LATER,
        "re-run",
        arc_challenge=56.31,
        arc_easy=79.42,
        boolq=86.64,
        hellaswag=81.73,
        openbookqa=45.80,
        piqa=83.35,
        winogrande=73.48,
    ),
    "mt-bench": {(CARD, MT_BENCH_MEAN): Published(6.86, "first card")},
}
