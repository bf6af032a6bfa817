"""MinorcaLM against lm_eval's own class for transformers: ids, log-likelihoods, generations, and metrics of tasks."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from minorca import UserError, load_model, load_tokenizer
from minorca.evaluate.generation import generate_texts, read_options
from minorca.evaluate.harness import MinorcaLM
from minorca.evaluate.result_cache import ResultCache
from minorca.generate import generate
from minorca.generate.engine import Engine
from tests.evaluate.harness_oracle import CHATML, FACTS, give_bos, hugging_face, save_bpe, write_tasks
from tests.helpers import random_adapter

CONTEXTS = ["", " ", "Question: What do bees make?\nAnswer:", "Question: What do bees ", "a\n\n", "<s>What", "é" * 9]
CONTINUATIONS = [" honey", "honey", " a", "\n", " honey and more, of the best. ", "</s>", "<s>"]
# cut on the left: 96 positions
LONG = "".join(f"Question: {question}?\nAnswer: {answer}\n\n" for question, answer, _ in FACTS)


def instances(kind, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


@pytest.fixture
def models(save_mistral):
    """models(adds_bos, **fields): a directory with a tokenizer, ours in fp32, and transformers'."""

    def make(adds_bos: bool = True, **fields):
        fields = {"vocab_size": 400, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 1} | fields
        directory, theirs = save_mistral(**fields)
        save_bpe(directory, adds_bos)
        return directory, load_model(directory, torch.float32, "cpu"), theirs

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leaves out what lm_eval collects of the machine, which takes a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def assert_same_logps(ours, theirs) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("adds_bos, add_bos", [(True, None), (True, False), (False, None), (True, True)])
def test_loglikelihoods_are_lm_evals(adds_bos, add_bos, models):
    """Trailing spaces, empty and over-long contexts, continuations of one token, texts that begin with BOS."""
    directory, model, theirs = models(adds_bos)
    ours = MinorcaLM(model, load_tokenizer(directory), add_bos=add_bos)
    reference = hugging_face(directory, theirs, add_bos_token=add_bos)
    assert ours.add_bos == (adds_bos if add_bos is None else add_bos)
    pairs = [(context, continuation) for context in (*CONTEXTS, LONG) for continuation in CONTINUATIONS]
    # lm_eval's class asserts that something is left of each
    pairs = [pair for pair in pairs if pair != ("", "<s>") and (pair[0] != " " or ours.add_bos)]
    requests = instances("loglikelihood", *pairs)
    assert_same_logps(ours.loglikelihood(requests), reference.loglikelihood(requests, disable_tqdm=True))
    assert ours.counts.truncated == len(CONTINUATIONS)
    assert ours.counts.computed < ours.counts.tokens / 2


@pytest.mark.parametrize("window", [None, 32])
def test_rolling_loglikelihoods_are_lm_evals(window, models):
    """Texts shorter and longer than the model's 96 positions, and an empty one."""
    directory, model, theirs = models(sliding_window=window)
    texts = [LONG, LONG[:150], "a", "", LONG * 2]
    requests = instances("loglikelihood_rolling", *((text,) for text in texts))
    ours = MinorcaLM(model, load_tokenizer(directory)).loglikelihood_rolling(requests)
    theirs = hugging_face(directory, theirs).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-6)


def test_generations_are_lm_evals(models):
    """Stop strings of several tokens, that begin within a token, and control tokens; contexts that are cut."""
    directory, model, theirs = models()
    # in a batch, lm_eval asks the first text alone whether it begins with BOS
    ours, reference = MinorcaLM(model, load_tokenizer(directory)), hugging_face(directory, theirs, batch_size=1)
    contexts = [LONG, "Question: What", "Answer: a", "<s>Which animal"]
    plain = {"until": ["\n\n\n"], "max_gen_toks": 40}
    requests = instances("generate_until", *((context, dict(plain)) for context in contexts))
    whole = ours.generate_until(requests)
    assert whole == reference.generate_until(requests, disable_tqdm=True)
    assert len(set(whole)) == len(contexts) and ours.counts.truncated == 1
    # applies without draws too
    penalized = plain | {"repetition_penalty": 3.0, "do_sample": False, "top_p": 0.5}
    requests = instances("generate_until", *((context, dict(penalized)) for context in contexts))
    assert whole != ours.generate_until(requests) == reference.generate_until(requests, disable_tqdm=True)
    # stops that do occur
    stops = [[text[5:9]] for text in whole] + [[text[3:4], text[8:14]] for text in whole] + [["</s>", "<|im_end|>"]] * 4
    arguments = [(context, {"until": stop, "max_gen_toks": 40}) for context, stop in zip(contexts * 3, stops)]
    requests = instances("generate_until", *arguments)
    stopped = ours.generate_until(requests)
    assert stopped == reference.generate_until(requests, disable_tqdm=True)
    assert all(len(short) < len(text) for short, text in zip(stopped, whole * 2) if text)


def test_a_generation_that_stops_at_once_ends_once(models):
    """A prompt's first token and the next come in one step of the engine."""
    directory, model, _ = models()
    tok = load_tokenizer(directory)
    prompt = tok.encode("Question: What")
    text = tok.decode(generate(model, [prompt], 1)[0])
    options = read_options({"until": [text], "max_gen_toks": 9}, tok, 9, 96)
    jobs = [options.of(prompt, 0, tok) for _ in range(3)]
    ended = list(generate_texts(Engine(model, 2, 96), tok, jobs))
    assert text and sorted(ended) == [(place, "", len(prompt) + 1) for place in range(3)]


def test_sampled_generations_repeat_and_differ_by_request(models):
    directory, model, _ = models()
    tok = load_tokenizer(directory)
    options = {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_gen_toks": 12}
    requests = instances("generate_until", ("What", options), ("What", options), ("Which", options))
    one = MinorcaLM(model, tok).generate_until(requests)
    assert len(set(one)) == 3 and one == MinorcaLM(model, tok).generate_until(requests)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        CHATML.replace("message['content']", "message['content'] | trim"),
        "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHATML,
    ],
    ids=["as it is", "strips contents", "takes no system message"],
)
def test_conversations_are_written_as_transformers_does(source, add_generation_prompt, models, caplog):
    """With the header of an answer, or up to the end of an answer's beginning."""
    directory, model, theirs = models(False)
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"chat_template": source}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = MinorcaLM(model, load_tokenizer(directory), "jinja")
    reference = hugging_face(directory, theirs)
    history = [{"role": role, "content": f" {role} says\n"} for role in ("system", "user", "assistant")]
    history = history[:2] if add_generation_prompt else history
    expected = reference.apply_chat_template(history, add_generation_prompt)
    assert [ours.apply_chat_template(history, add_generation_prompt) for _ in range(2)] == [expected, expected]
    assert caplog.text.count("written without their system message") == ("raise_exception" in source)


def evaluated(lm, folder, **options) -> dict:
    """lm_eval's results of all the folder's tasks, and its samples' requests."""
    evaluate: Any = simple_evaluate
    results = evaluate(
        lm,
        tasks=["local_tasks"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert results
    asked = {task: [sample["arguments"] for sample in samples] for task, samples in results["samples"].items()}
    answers = {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}
    return {"results": results["results"], "asked": asked, "answers": answers}


def assert_same_metrics(ours: dict, theirs: dict) -> None:
    """The same questions; accuracies and matches are equal, sums of probabilities to their accuracy."""
    assert ours["asked"] == theirs["asked"]
    assert ours["results"].keys() == theirs["results"].keys()
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            mine = ours["results"][task][name]
            is_exact = isinstance(value, str) or "perplexity" not in name and "byte" not in name and "mc2" not in task
            assert mine == value if is_exact else mine == pytest.approx(value, rel=1e-4), (task, name)


TURNS = {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": True}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_fewshot": 0}, marks=pytest.mark.slow, id="no examples"),
        pytest.param({"num_fewshot": 3}, id="three examples"),
        pytest.param(TURNS, id="examples as turns"),
        pytest.param(TURNS | {"fewshot_as_multiturn": False}, marks=pytest.mark.slow, id="examples in a turn"),
    ],
)
def test_tasks_give_lm_evals_metrics(options, models, tmp_path):
    """In the schemas of ARC, HellaSwag, Winogrande, TruthfulQA and GSM8K, read by lm_eval's own task files."""
    directory, model, theirs = models(max_position_embeddings=448, sliding_window=64, initializer_range=0.08)
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    ours = evaluated(MinorcaLM(model, load_tokenizer(directory)), folder, **options)
    assert_same_metrics(ours, evaluated(hugging_face(directory, theirs), folder, **options))


@pytest.mark.slow
@pytest.mark.parametrize("options, add_bos", [({"num_fewshot": 2}, True), (TURNS, None)], ids=["text", "chat"])
def test_smollm2_gives_lm_evals_answers(options, add_bos, smollm2, tmp_path):
    """Request by request, log-likelihoods in fp32 to 1e-4 of its in fp64 (its own in fp32 are up to 1.4e-4 off), and
    equal texts; and so the same metrics.

    SmolLM2's tokenizer adds no BOS by itself.
    """
    write_tasks(tmp_path)
    tok = load_tokenizer(smollm2)
    ours = evaluated(
        MinorcaLM(load_model(smollm2, torch.float32, "cpu"), tok, add_bos=add_bos), tmp_path, limit=1, **options
    )
    theirs = hugging_face(smollm2, AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64))
    if add_bos:
        give_bos(theirs)
    theirs = evaluated(theirs, tmp_path, limit=1, **options)
    assert_same_metrics(ours, theirs)
    for task, rows in theirs["answers"].items():
        for mine, row in zip(ours["answers"][task], rows, strict=True):
            for (answer,), (reference,) in zip(mine, row, strict=True):
                if isinstance(reference, tuple):
                    assert answer[1] == reference[1] and answer[0] == pytest.approx(reference[0], abs=1e-4), task
                elif isinstance(reference, float):
                    assert answer == pytest.approx(reference, abs=1e-3), task
                else:
                    assert answer == reference, task


def test_an_adapter_is_used(models, tmp_path):
    directory, _, base = models()
    theirs = random_adapter(base, tmp_path / "adapter", ("q", "v", "down"))
    requests = instances("loglikelihood", *((LONG[:200], continuation) for continuation in CONTINUATIONS))
    adapted = load_model(directory, torch.float32, "cpu", tmp_path / "adapter")
    ours = MinorcaLM(adapted, load_tokenizer(directory)).loglikelihood(requests)
    assert_same_logps(ours, hugging_face(directory, theirs).loglikelihood(requests, disable_tqdm=True))


def test_a_killed_evaluation_goes_on_to_the_same_bits(models, tmp_path):
    """Interrupted in the middle, log-likelihoods and generations are those of one go, and nothing is scored twice."""
    directory, model, _ = models()
    tok = load_tokenizer(directory)
    pairs = [(context, end) for context in (LONG, LONG[:99], "a") for end in CONTINUATIONS[:5]]
    asked = instances("loglikelihood", *pairs), instances("generate_until", *((c, {"until": ["a"]}) for c, _ in pairs))
    whole = MinorcaLM(model, tok, max_gen_toks=9)
    expected = whole.loglikelihood(asked[0]), whole.generate_until(asked[1])

    def open_cache() -> ResultCache:
        return ResultCache(tmp_path / "results", {"model": "this"})

    class Killed(Exception):
        pass

    scored = []

    def killing(lm: MinorcaLM, after: int) -> MinorcaLM:
        stream = lm.scorer.stream

        def stream_until_killed(requests):
            for done, (index, score) in enumerate(stream(requests)):
                if done == after:
                    raise Killed
                scored.append(requests[index])
                yield index, score

        lm.scorer.stream = stream_until_killed
        return lm

    for after in (4, 6):
        with pytest.raises(Killed):
            killing(MinorcaLM(model, tok, max_gen_toks=9, cache=open_cache()), after).loglikelihood(asked[0])
    last = killing(MinorcaLM(model, tok, max_gen_toks=9, cache=open_cache()), -1)
    assert last.loglikelihood(asked[0]) == expected[0] and last.generate_until(asked[1]) == expected[1]
    keys = [(tuple(context), tuple(continuation)) for context, continuation in scored]
    assert len(keys) == len(set(keys)) == len(pairs)
    # all of it is there now
    forwards = []
    model.register_forward_hook(lambda *call: forwards.append(call))
    idle = MinorcaLM(model, tok, max_gen_toks=9, cache=open_cache())
    assert (idle.loglikelihood(asked[0]), idle.generate_until(asked[1])) == expected and not forwards


def test_whether_texts_began_with_bos_is_known(models):
    """Given or their own, as those that a chat template writes."""
    directory, model, _ = models()
    for add_bos, texts, begins in (
        (True, ["a", "<s>a"], True),
        (False, ["<s>a", "<s>b"], True),
        (False, ["a", "<s>b"], None),
        (False, ["a"], False),
    ):
        lm = MinorcaLM(model, load_tokenizer(directory), add_bos=add_bos)
        lm.loglikelihood(instances("loglikelihood", *((text, " b") for text in texts)))
        assert lm.begins_with_bos is begins and lm.counts.requests == len(texts)


def test_ranks_of_other_arithmetic_are_refused(models):
    """Their bits would be mixed."""
    directory, model, _ = models()
    world: Any = SimpleNamespace(rank=1, size=2, keys_that_differ=lambda values: [*values][2:3])
    with pytest.raises(UserError, match="ranks give other bits: rank 1 has device .* threads; start all of them alike"):
        MinorcaLM(model, load_tokenizer(directory), world=world)


def test_what_a_model_cannot_answer_is_named(models):
    directory, model, _ = models()
    lm = MinorcaLM(model, load_tokenizer(directory))
    for options, message in (
        ({"num_beams": 4}, "num_beams is 4; expected 1"),
        ({"max_gen_toks": 96}, "max_gen_toks is 96; expected 1 to 95"),
        ({"max_gen_toks": None, "max_new_tokens": "many"}, "max_new_tokens is 'many'; expected an integer"),
        ({"typical_p": 0.5}, "unknown typical_p"),
        ({"until": [5]}, r"until is \[5\]; expected a text or a list of texts"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; expected true or false"),
        ({"temperature": 1.0, "top_k": None}, "generation_kwargs.top_k is None; expected an integer"),
        ({5: 5}, "has the unknown 5"),
        ({"do_sample": True}, "temperature is 0 or missing; do_sample needs"),
        ({"temperature": 200}, "generation_kwargs.temperature must be from 0 to 100"),
        ({"temperature": 1.0, "top_p": "0.9"}, "generation_kwargs.top_p is '0.9'; expected a number"),
    ):
        with pytest.raises(UserError, match=message):
            lm.generate_until(instances("generate_until", ("a", {"max_gen_toks": 9} | options)))
    # with a text in front, whose tokens are its own
    with pytest.raises(UserError, match=r"(?s)the continuation 'Q.* of 'a' has \d+ tokens, the model 96"):
        lm.loglikelihood(instances("loglikelihood", ("b", "a"), ("a", LONG)))
    with pytest.raises(UserError, match="continuation of 'a' is empty"):
        lm.loglikelihood(instances("loglikelihood", ("a", "")))
    tok = load_tokenizer(directory)
    tok.bos_id = None
    with pytest.raises(UserError, match="no BOS"):
        MinorcaLM(model, tok, add_bos=True)
