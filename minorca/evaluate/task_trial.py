"""Tasks evaluated on two rows by a model that knows nothing: what fails then would fail after hours."""

from pathlib import Path
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.manager import TaskDict

from minorca.errors import UserError
from minorca.evaluate.generation import check_options
from minorca.evaluate.harness import evaluate_tasks
from minorca.evaluate.task_rows import writes_by_config

ROWS = 2


class _Blank(LM):
    """Finds all texts equally likely, and writes none."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        for request in requests:
            check_options(cast(tuple[str, dict], request.args)[1])
        return [""] * len(requests)


def try_tasks(loaded: TaskDict, num_fewshot: int | None, name: str, path: Path | None) -> None:
    """Evaluates tasks in every way but by a model: prompts with examples, options, filters, metrics, averages.

    Args:
        loaded: of lm_eval's TaskManager.load.
        num_fewshot: the examples before each question; None: what each task says.
        name: of the task or group.
        path: its file.

    Raises:
        UserError: what fails, or a metric that the task does not give.
    """
    says = {task: task.get_config("num_fewshot") for task in loaded["tasks"].values()}
    try:
        results: Any = evaluate_tasks(_Blank(), loaded, num_fewshot, limit=ROWS, log_samples=True, bootstrap_iters=0)
    except UserError as error:
        for problem in error.problems:
            problem.path = path
        raise
    # a task's file, its functions and lm_eval may raise anything
    except Exception as error:
        message = f"{name} cannot be evaluated ({type(error).__name__}: {error})"
        raise UserError(" ".join(message.split()), path=path) from error
    finally:
        for task, shots in says.items():
            task.set_config(key="num_fewshot", value=shots)
    for task in loaded["tasks"].values():
        given = {key.partition(",")[0] for key in results["results"].get(task.task_name, {})}
        # functions of the task's own may give others for other rows
        is_plain = isinstance(task, ConfigurableTask) and writes_by_config(task) and not task.config.process_results
        for metric in (task.config.metric_list or ()) if is_plain else ():
            wanted = metric["metric"]
            if isinstance(wanted, str) and wanted not in given:
                kind = task.OUTPUT_TYPE
                raise UserError(f"has {wanted}, which {name}, of {kind}, does not give", path=path, field="metric_list")
