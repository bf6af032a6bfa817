"""How long a run is, and after which steps it evaluates and saves: known once its rows are."""

from collections.abc import Container
from dataclasses import dataclass

from minorca.config import Config, epochs_in
from minorca.config_rules import warmup_problem
from minorca.data.packing import BatchSchedule


@dataclass(frozen=True)
class RunLength:
    """The steps of a run, counted from 1, and after which of them, beside the last, it evaluates held-out rows, saves,
    and evaluates tasks.
    """

    steps: int
    evaluations: Container[int]
    checkpoints: Container[int]
    tasks: Container[int] = ()

    def evaluates_after(self, step: int) -> bool:
        return step == self.steps or step in self.evaluations

    def evaluates_tasks_after(self, step: int) -> bool:
        return step == self.steps or step in self.tasks

    def saves_after(self, step: int) -> bool:
        return step == self.steps or step in self.checkpoints


def run_length(config: Config, schedule: BatchSchedule) -> RunLength:
    """Raises UserError: the warm-up is as long as the run, or no row is drawn in its epochs."""
    train = config.train
    steps = train.steps or schedule.steps(train.epochs)
    if error := warmup_problem(config.optim, steps):
        raise error
    every = (train.eval_every, train.checkpoint_every, config.eval.every)
    return RunLength(steps, *(_due(each, schedule, steps) for each in every))


def _due(every: int | str, schedule: BatchSchedule, steps: int) -> Container[int]:
    """The steps after which something is done every so many steps or epochs."""
    epochs = epochs_in(every)
    if epochs is not None:
        return schedule.steps_every(epochs, steps)
    return range(int(every), steps + 1, int(every)) if every else ()
