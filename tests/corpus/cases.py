"""All cases."""

from tests.corpus import answers, broken_files, broken_rows, columns, kinds, shapes, texts
from tests.corpus.case import Case

MODULES = (kinds, shapes, columns, answers, texts, broken_files, broken_rows)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]
