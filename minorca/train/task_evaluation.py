"""Tasks of lm_eval, evaluated on the model while it is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule

from minorca.config import EvalConfig
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.files.safe_io import user_path
from minorca.model.network import Mistral
from minorca.train.ranks import World

# not among the requirements
if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict


class TaskEvaluation:
    """The tasks of `eval.tasks` with their data, to be evaluated again and again.

    Args:
        loaded: of each task or group, what lm_eval's TaskManager.load returns.
    """

    def __init__(self, config: EvalConfig, loaded: Sequence[TaskDict]):
        self.config = config
        self.loaded = loaded

    def __call__(
        self, model: Mistral, tok: Tokenizer, world: World, noted: Sequence[int] = ()
    ) -> dict[str, float] | None:
        """Each task's metrics, as `eval_TASK/METRIC`. Every rank calls it, and gets all of them.

        noted: signals of this rank; once any rank has one, the evaluation ends after a task and gives None.
        """
        from minorca.evaluate.harness import MinorcaLM, evaluate_tasks

        # the forwards of a sharded model are collectives, of which every rank must make as many
        is_sharded = isinstance(model, FSDPModule)
        lm = MinorcaLM(model, tok, world=None if is_sharded else world, quiet=world.rank > 0)
        values = {}
        is_stopped = False
        model.eval()
        for loaded in self.loaded:
            # standard errors are not recorded
            options = {"limit": self.config.limit, "log_samples": False, "bootstrap_iters": 0}
            results = evaluate_tasks(lm, loaded, self.config.num_fewshot, **options)
            values |= dict(_metrics(results.get("groups", {}))) or dict(_metrics(results["results"]))
            if is_stopped := bool(world.sum([len(noted)])[0]):
                break
        model.train()
        return None if is_stopped else values


def _metrics(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for task, metrics in results.items():
        for key, value in metrics.items():
            # those of a filter that does nothing have no other name
            name = key.removesuffix(",none")
            if "," in key and "_stderr," not in key and isinstance(value, int | float):
                yield f"eval_{task}/{name}", float(value)


def open_tasks(config: EvalConfig) -> TaskEvaluation | None:
    """The tasks of a run; None where it has none.

    Raises:
        UserError: lm_eval is missing, a task is unknown, or its files or data are invalid.
    """
    if not config.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        message = "needs lm_eval, which is not installed; pip install lm_eval==0.4.13, or leave the key out"
        raise UserError(message, field="eval.tasks")
    from minorca.evaluate.task_files import load_tasks

    include_path = user_path(config.include_path) if config.include_path else None
    try:
        tasks, manager = load_tasks(config.tasks, include_path, config.limit, config.num_fewshot)
    except UserError as error:
        settings = {f"--{key.replace('_', '-')}": f"eval.{key}" for key in ("tasks", "include_path", "num_fewshot")}
        for problem in error.problems:
            problem.field = settings.get(problem.field or "", problem.field)
        raise
    return TaskEvaluation(config, [manager.load([task]) for task in tasks])
