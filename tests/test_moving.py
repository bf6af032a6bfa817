"""The tables of docs/moving: every key of ours exists, and a file with another tool's key is answered with ours."""

import dataclasses
import re
from pathlib import Path

import pytest

from minorca.config_file import settings, suggestion
from tests.helpers import ROOT

# without an answer of their own: their absence is what a page names, or they are near the name of a section here
UNANSWERED = {"adapter", "use_peft", "optim", "optimizer", "data.data"}
KEY = r"`([\w.]+)`"
PAGES = sorted((ROOT / "docs" / "moving").glob("*.md"))


def rows(page: Path) -> list[tuple[list[str], list[str]]]:
    """The keys in the first two cells of each row of the table of keys."""
    (table,) = re.findall(r"^## Keys\n\n(.*?)\n\n", page.read_text(), re.M | re.S)
    cells = [row.split(" | ")[:2] for row in table.splitlines()[2:]]
    return [(re.findall(KEY, theirs), re.findall(KEY, ours)) for theirs, ours in cells]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_another_tools_keys_are_answered_with_ours(page):
    found = rows(page)
    assert len(found) > 15
    for theirs, ours in found:
        assert theirs and ours and set(ours) <= set(settings()), (theirs, ours)
        for key in theirs:
            if key not in UNANSWERED and key not in ours:
                assert re.fullmatch(f"; here it is ({'|'.join(ours)})", suggestion(key)), (key, ours)


def test_the_keys_of_trl_are_its_own():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl.scripts.utils import ScriptArguments
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    classes = (SFTConfig, DPOConfig, KTOConfig, ModelConfig, ScriptArguments, LoraConfig)
    known = {field.name for each in classes for field in dataclasses.fields(each)}
    known |= set(BitsAndBytesConfig().to_dict())
    (page,) = [page for page in PAGES if page.stem == "trl"]
    assert not {key for theirs, _ in rows(page) for key in theirs} - known
