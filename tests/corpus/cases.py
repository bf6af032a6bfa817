"""All cases."""

from tests.corpus import answers, kinds, refusals, shapes, texts
from tests.corpus.case import Case

CASES: list[Case] = [*kinds.CASES, *shapes.CASES, *answers.CASES, *texts.CASES, *refusals.CASES]
