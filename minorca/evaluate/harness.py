"""lm_eval's model class on this engine.

Texts become ids as lm_eval's own class for transformers makes them (lm_eval 0.4.13, models/huggingface.py), and
answers mean the same: how a context and its continuation are separated, what an empty context becomes, where one that
is too long is cut, where a generation stops. Control strings in a task's texts are control tokens, as there.

Every rank gets all requests and computes a share of them; all of them return all answers.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.tasks.manager import TaskDict

from minorca.data.chat_template import PROBES, resolve_template
from minorca.data.portable_template import portable_template
from minorca.data.shipped_template import special_tokens, write_by
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.evaluate.answers import Answers
from minorca.evaluate.generation import generate_texts, read_options
from minorca.evaluate.result_cache import ResultCache
from minorca.evaluate.scoring import Scorer, build_trie
from minorca.evaluate.task_rows import shots_of
from minorca.files.safe_io import quote
from minorca.generate.engine import CHUNK, Engine
from minorca.generate.request import default_max_length
from minorca.model.network import Mistral
from minorca.train.ranks import World

log = logging.getLogger(__name__)

# sequences that are generated at once, by type of device
SLOTS = {"cuda": 32, "cpu": 8}
# of the draws of few-shot examples, lm_eval's default
FEWSHOT_SEED = 1234
# Marks where the last message ends, as in transformers (utils/chat_template_utils.py).
END_OF_MESSAGE = "\ue000END_OF_MESSAGE "


def evaluate_tasks(lm: LM, loaded: TaskDict, num_fewshot: int | None = None, **options) -> dict[str, Any]:
    """lm_eval's results of tasks, as simple_evaluate gives them without what it collects of the machine, which takes
    longer than small tasks.

    Args:
        loaded: what lm_eval's TaskManager.load returns.
        num_fewshot: the examples before each question; None: what each task says.
        options: of lm_eval's evaluate.
    """
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=shots_of(task, num_fewshot))
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    # its decorator hides its parameters from type checkers
    evaluate: Any = evaluator.evaluate
    return evaluate(lm, loaded, **options)


@dataclass
class Counts:
    """What was done for the requests that were not in the cache, on this rank.

    Attributes:
        requests: all that lm_eval asked for, on any rank, with those in the cache.
        truncated: those that were longer than the model, and were cut on the left.
        tokens: of which log-probabilities were asked for, with their contexts, or that were prompts or generated.
        computed: that went through the model.
    """

    requests: int = 0
    truncated: int = 0
    tokens: int = 0
    computed: int = 0


class _CannotScore(Exception):
    """Why a continuation cannot be scored after its context."""

    def __init__(self, texts: tuple[str, str], reason: str):
        super().__init__()
        self.texts = texts
        self.reason = reason


class MinorcaLM(TemplateLM):
    """A model as lm_eval takes it, on its device, with its adapter if it has one.

    Args:
        model: in evaluation mode.
        template: the name of the chat template, for tasks that are evaluated as chats.
        add_bos: whether texts start with BOS; None: whether the tokenizer adds it.
        max_gen_toks: tokens to generate for tasks that do not say.
        cache: where results are kept; None: nowhere.
        world: the ranks that share the requests; None: this process does all.
        slots: sequences that are generated at once, on which their bits depend; by default 32 on CUDA, 8 on the CPU.
        quiet: shows no progress.

    Attributes:
        add_bos: whether texts are given BOS.
        begins_with_bos: whether the texts so far began with BOS, given or their own, as a chat template's; None: some.
        max_length: the model's positions; a request has at most as many and one more.
        counts: what was done so far.

    Raises:
        UserError: BOS is asked for, and the tokenizer has none; it has neither BOS nor EOS; the ranks differ.
    """

    def __init__(
        self,
        model: Mistral,
        tok: Tokenizer,
        template: str = "auto",
        *,
        add_bos: bool | None = None,
        max_gen_toks: int = 256,
        cache: ResultCache | None = None,
        world: World | None = None,
        slots: int | None = None,
        quiet: bool = False,
    ):
        super().__init__()
        if add_bos and tok.bos_id is None:
            raise UserError("the tokenizer has no BOS token, which --bos asks for", path=tok.path)
        if tok.bos_id is None and tok.eos_id is None:
            raise UserError("the tokenizer has neither BOS nor EOS, one of which an empty context needs", path=tok.path)
        self.model = model
        # not `tokenizer`, which lm_eval takes for one of transformers
        self.tok = tok
        self.template = template
        self.add_bos = tok.adds_bos if add_bos is None else add_bos
        self.max_gen_toks = max_gen_toks
        self.max_length = default_max_length(model.arch)
        self.counts = Counts()
        self.scorer = Scorer(model)
        self._device = self.scorer.device
        kind = self._device.type
        self.slots = slots or SLOTS[kind]
        arithmetic = self.scorer.arithmetic() | {"slots": self.slots, "chunk": CHUNK[kind]}
        # None: unless standard error is no terminal
        self._no_progress = True if quiet or (world and world.rank) else None
        self._answers = Answers(arithmetic, cache, world, self._no_progress)
        self._bos_starts: set[bool] = set()
        # the choices of a question share their context
        self._encode = lru_cache(maxsize=4)(tok.encode_template)
        self._drops_system = False

    # ------------------------------------------------------------------------------------------------ texts and ids

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self.tok.eos_id is None else self.tok.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text where nothing else does."""
        return cast(int, self.tok.eos_id if self.tok.bos_id is None else self.tok.bos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The ids of a text; BOS in front where `add_bos` says so and the text does not have it."""
        ids = self._encode(string)
        add = self.add_bos if add_special_tokens is None else add_special_tokens
        has_bos = add_special_tokens is None and ids[:1] == [self.tok.bos_id]
        ids = [cast(int, self.tok.bos_id), *ids] if add and not has_bos else list(ids)
        self._bos_starts.add(ids[:1] == [self.tok.bos_id])
        return ids

    @property
    def begins_with_bos(self) -> bool | None:
        return None if len(self._bos_starts) > 1 else self._bos_starts == {True}

    @property
    def tokenizer_name(self) -> str:
        return str(self.tok.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the chat template, in Jinja.

        Raises:
            UserError: the tokenizer has none, and none was chosen.
        """
        return self._chat_source

    @cached_property
    def _chat_source(self) -> str:
        source = portable_template(self.tok, resolve_template(self.tok, self.template))
        if source is None:
            raise UserError("has no chat template; choose one by --template, or leave --chat out", path=self.tok.path)
        shipped = self.tok.chat_template
        return shipped if shipped and self._write_the_same(shipped, source) else source

    def _write_the_same(self, one: str, other: str) -> bool:
        """Whether two templates write the same wherever an answer is asked for, but for BOS, which texts get anyway."""
        bos = special_tokens(self.tok).get("bos_token", "")
        try:
            return all(
                write_by(one, self.tok, messages, [], True).removeprefix(bos)
                == write_by(other, self.tok, messages, [], True).removeprefix(bos)
                for messages, is_prompt in PROBES
                if is_prompt
            )
        except UserError:
            return False

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with the header that asks for an answer, or ending in its last message.

        A template that fails with a system message writes the conversation without it, which is logged once.
        """
        messages = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += END_OF_MESSAGE
        try:
            text = write_by(self._chat_source, self.tok, messages, [], add_generation_prompt)
        except UserError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            if not self._drops_system:
                log.warning("conversations are written without their system message: %s", error)
            self._drops_system = True
            text = write_by(self._chat_source, self.tok, others, [], add_generation_prompt)
        if add_generation_prompt:
            return text
        # a template that strips contents strips the mark's space too, and with it that before the mark
        text, mark, rest = text.rpartition(END_OF_MESSAGE.rstrip())
        if not mark:
            raise UserError("the chat template does not write the message that is to be continued", path=self.tok.path)
        return text if rest.startswith(" ") else text.rstrip()

    # ---------------------------------------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's continuation after its context: the log-likelihood, and whether it is the likeliest.

        Raises:
            UserError: a continuation is empty, becomes part of the context's last token, or is longer than the model.
        """
        self.counts.requests += len(requests)
        for request in requests:
            context, continuation = cast(tuple[str, str], request.args)
            if not continuation:
                raise UserError(f"the continuation of {context[-40:]!r} is empty", path=request.task_name)
        try:
            return super().loglikelihood(requests, disable_tqdm=cast(bool, self._no_progress))
        except _CannotScore as error:
            task = next(request.task_name for request in requests if request.args == error.texts)
            context, continuation = error.texts
            text = f"the continuation {quote(continuation)} of {context[-40:]!r}"
            raise UserError(f"{text} {error.reason}", path=task) from None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each request's text, the log-likelihood; one longer than the model is taken in windows."""
        self.counts.requests += len(requests)
        windows = []
        owners = []
        for owner, request in enumerate(requests):
            (text,) = cast(tuple[str], request.args)
            for pair in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((("", text), *utils.make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += logp
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            if not continuation:
                raise _CannotScore(texts, "has no tokens of its own")
            if len(continuation) > self.max_length:
                raise _CannotScore(texts, f"has {len(continuation)} tokens, the model {self.max_length} positions")
            # a context of spaces, which are part of the continuation
            context = context or [self.prefix_token_id]
            beyond = len(context) + len(continuation) - self.max_length - 1
            self.counts.truncated += beyond > 0
            pairs.append((context[max(0, beyond) :], continuation))
        digests = [self._answers.digest("loglikelihood", context, continuation) for context, continuation in pairs]

        def share(missing: list[int], rank: int, size: int) -> list[int]:
            if size == 1:
                return missing
            # neighbours in the order of their ids, which share beginnings; the nodes of the trie are divided evenly
            trie = build_trie([pairs[index] for index in missing])
            owners = (np.array(trie.ends) - 1) * size // trie.ends[-1]
            return [missing[place] for place, owner in zip(trie.order, owners) if owner == rank]

        def compute(mine: list[int]) -> Iterator[tuple[int, list]]:
            chosen = [pairs[index] for index in mine]
            self.counts.tokens += sum(len(context) + len(continuation) - 1 for context, continuation in chosen)
            before = self.scorer.computed
            for place, scored in self.scorer.stream(chosen):
                yield mine[place], [scored.logp, scored.is_greedy]
            self.counts.computed += self.scorer.computed - before

        answers = self._answers("log-likelihoods", digests, share, compute)
        return [(logp, is_greedy) for logp, is_greedy in answers]

    # --------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of each request, what the model writes after its context, up to the first of its stop strings.

        Raises:
            UserError: generation_kwargs that are unknown or out of range, or that leave no room for a context.
        """
        self.counts.requests += len(requests)
        seen: dict[str, int] = {}
        jobs = []
        for request in requests:
            context, kwargs = cast(tuple[str, dict], request.args)
            try:
                options = read_options(kwargs, self.tok, self.max_gen_toks, self.max_length)
            except UserError as error:
                for problem in error.problems:
                    problem.path = request.task_name
                raise
            name = json.dumps([request.task_name, *request.args], sort_keys=True)
            seen[name] = seen.get(name, -1) + 1
            room = self.max_length - options.new_tokens
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.counts.truncated += len(ids) > room
            jobs.append(options.of(ids[-room:], seen[name], self.tok))
        digests = [self._answers.digest(json.dumps(job.options), job.request.prompt) for job in jobs]
        longest = max((len(job.request.prompt) + job.request.max_new_tokens for job in jobs), default=0)

        def share(missing: list[int], rank: int, size: int) -> list[int]:
            # longest first, so that what remains at the end is short
            return sorted(missing, key=lambda index: -len(jobs[index].request.prompt))[rank::size]

        def compute(mine: list[int]) -> Iterator[tuple[int, str]]:
            engine = Engine(self.model, self.slots, longest)
            for place, text, tokens in generate_texts(engine, self.tok, [jobs[index] for index in mine]):
                self.counts.tokens += tokens
                self.counts.computed += tokens
                yield mine[place], text

        return self._answers("generations", digests, share, compute)
