"""All cases."""

from tests.corpus import kinds
from tests.corpus.case import Case

CASES: list[Case] = [*kinds.CASES]
