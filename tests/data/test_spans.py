"""How much is encoded of long conversations, some of whose tokens cross the border of an answer."""

import shutil

import pytest

from minorca import load_tokenizer, render_chat
from minorca.data import jinja_template, spans
from tests.data.test_tekken import FILE
from tests.data.test_tokenizer import V1, sentencepiece_directory

TEMPLATE = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"


def prose(length: int, end: str) -> list[dict]:
    roles = ("user", "assistant") * length
    return [{"role": role, "content": f"{n} {'word ' * 30}end{end}"} for n, role in zip(range(length), roles)]


@pytest.mark.parametrize("end", [".", "", ".\n"])
@pytest.mark.parametrize("form", ["tekken", "sentencepiece"])
def test_twice_the_messages_are_twice_the_work(form, end, tmp_path, monkeypatch):
    """In characters encoded. Tekken joins a full stop to newlines; no later window has the ids of the two apart."""
    if form == "tekken":
        shutil.copy(FILE, tmp_path / "tekken.json")
    else:
        sentencepiece_directory(tmp_path, V1)
    tok = load_tokenizer(tmp_path)
    tok.chat_template = TEMPLATE
    encode, encoded = tok.encode_template, []

    def counted(text):
        encoded.append(len(text))
        return encode(text)

    def work(length, masked):
        encoded.clear()
        if masked:
            jinja_template.render_training(tok, prose(length, end), [], True)
        else:
            render_chat(tok, prose(length - 1, end), template="jinja", max_ids=10**7)
        return sum(encoded)

    monkeypatch.setattr(tok, "encode_template", counted)
    for masked in (True, False):
        assert work(240, masked) < 2.1 * work(120, masked)
    rendered = jinja_template.render_training(tok, prose(100, end), [], True)
    monkeypatch.setattr(spans, "CONTEXT", 10**9)
    assert rendered == jinja_template.render_training(tok, prose(100, end), [], True)
