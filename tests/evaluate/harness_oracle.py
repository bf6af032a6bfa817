"""lm_eval's own model class beside ours, and tasks to run both on: files that this writes, in known data sets' schemas,
read by lm_eval's own task files.
"""

import json
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TASKS = Path(lm_eval.__file__).parent / "tasks"

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

FACTS = [
    ("What do bees make", "honey", ["milk", "paper", "glass"]),
    ("What falls from clouds", "rain", ["sand", "iron", "bread", "wool"]),
    ("Which animal barks", "a dog", ["a fish", "a snake", "a spider"]),
    ("What do we read", "books", ["spoons", "bricks", "clouds"]),
    ("Where do fish live", "in water", ["in fire", "on the moon", "in trees"]),
    ("What melts in the sun", "ice", ["stone", "wood", "clay"]),
    ("What has wheels", "a car", ["a river", "a cloud", "a song"]),
    ("What do cows eat", "grass", ["stones", "letters", "glass"]),
]


def save_bpe(directory: Path, adds_bos: bool) -> None:
    """A byte-level tokenizer of 400 ids, beside a model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False) for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"Question: {question}?\nAnswer: {answer}\n\n" for question, answer, _ in FACTS]
    tokenizer.train_from_iterator(text * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"chat_template": CHATML, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def hugging_face(directory: Path, model=None, **options) -> Any:
    """lm_eval's class for transformers on a directory's tokenizer, and on `model` or the directory's."""
    tok = transformers.AutoTokenizer.from_pretrained(directory)
    if model is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # their decorators hide parameters from type checkers
    reference: Any = HFLM
    return reference(pretrained=model.eval(), tokenizer=tok, **{"batch_size": 4} | options)


def give_bos(reference: Any) -> None:
    """Makes its tokenizer add BOS, whatever it did before."""
    token = reference.tokenizer.bos_token
    reference.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, reference.tokenizer.bos_token_id)]
    )


def rows_of(name: str) -> list[dict]:
    """Rows in a known data set's schema."""
    rows = []
    for n, (question, right, wrong) in enumerate(FACTS):
        choices = [right, *wrong]
        choices = choices[n % len(choices) :] + choices[: n % len(choices)]
        label = choices.index(right)
        other = choices[1 - label] if label < 2 else choices[0]
        letters = "ABCDE"[: len(choices)]
        rows.append(
            {
                "arc": {
                    "id": str(n),
                    "question": f"{question}?",
                    "choices": {"text": choices, "label": list(letters)},
                    "answerKey": letters[label],
                },
                "hellaswag": {
                    "activity_label": "Facts",
                    "ctx_a": f"Somebody asks: {question}? [title]",
                    "ctx_b": "the other says",
                    "endings": [f"{choice}. [step]" for choice in choices],
                    "label": str(label),
                },
                "winogrande": {
                    "sentence": f"{question}, {right} or {other}? It is _ that is meant by {n} of us.",
                    "option1": right if n % 2 else other,
                    "option2": other if n % 2 else right,
                    "answer": "1" if n % 2 else "2",
                },
                "truthfulqa": {
                    "question": f"{question}?",
                    "mc1_targets": {"choices": [right, *wrong], "labels": [1] + [0] * len(wrong)},
                    "mc2_targets": {"choices": [right, f"It is {right}", *wrong], "labels": [1, 1] + [0] * len(wrong)},
                },
                "gsm8k": {
                    "question": f"{question}, {n} + {n + 1}?",
                    "answer": f"{n} and {n + 1} make {2 * n + 1}.\n#### {2 * n + 1}",
                },
                "lambada": {"text": f"{question}? It is {right}"},
                "text": {"page": f"{question}? {right}! " * (1 + 12 * (n % 3 == 1))},
            }[name]
        )
    return rows


# name -> lm_eval's own file, the schema of its rows, and what differs here beside the data
MIRRORED = {
    "arc": ("arc/arc_easy.yaml", "arc", {}),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag", {}),
    "winogrande": ("winogrande/default.yaml", "winogrande", {}),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa", {}),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa", {}),
    "gsm8k": (
        "gsm8k/gsm8k.yaml",
        "gsm8k",
        {"num_fewshot": 2, "generation_kwargs": {"until": ["Question:", "an", "</s>"], "max_gen_toks": 24}},
    ),
    "lambada": ("lambada/lambada_openai.yaml", "lambada", {}),
    "text": ("wikitext/wikitext.yaml", "text", {}),
}


def write_tasks(directory: Path) -> list[str]:
    """Writes lm_eval's tasks on local rows, as NAME_local; returns their names."""
    names = []
    for name, (file, schema, changes) in MIRRORED.items():
        rows = directory / f"{schema}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(schema)))
        splits = {"train": str(rows), "validation": str(rows), "test": str(rows)}
        config = {
            "include": str(TASKS / file),
            "task": f"{name}_local",
            "tag": "local_tasks",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits},
        } | changes
        # JSON is YAML
        (directory / f"{name}.yaml").write_text(json.dumps(config))
        names.append(f"{name}_local")
    return names
