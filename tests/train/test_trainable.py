"""The set of trained parameters: another member needs no change to the loop, checkpoints or parallelism."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minorca import load_model
from minorca.cli import config_parser, parse_config
from minorca.model.network import Mistral, RMSNorm
from minorca.train import checkpoint
from minorca.train.best import Best
from minorca.train.build import Learner, build, lora_settings
from minorca.train.inputs import read_inputs
from minorca.train.loop import Run
from minorca.train.optim import adamw
from minorca.train.ranks import init_distributed
from minorca.train.run_length import RunLength
from minorca.train.trainable import Adapters, TrainableSet
from tests.helpers import gradients_of


class Norms:
    """A member defined outside of the package: the weights of all norms, saved in a file of their own."""

    def __init__(self, model: Mistral):
        self.model = model
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        norms = ((name, module) for name, module in self.model.named_modules() if isinstance(module, RMSNorm))
        return {f"{name}.weight": module.weight for name, module in norms}

    def save(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        save_file(dict(tensors), directory / "norms.safetensors")

    def load(self, directory: Path) -> None:
        saved = load_file(directory / "norms.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(saved[name])


def train(options: list[str], stop: int, found: Path | None = None) -> Learner:
    """Trains adapters and norms, from the checkpoint `found` or from the start, up to step `stop`."""
    _, config = parse_config(config_parser("test", ""), options)
    with init_distributed(60) as world:
        inputs = read_inputs(config)
        learner = build(config, inputs.base, world)
        adapters = Adapters(learner.model, lora_settings(config), config.model.path)
        learner.trainable = TrainableSet([adapters, Norms(learner.model)])
        learner.optimizer = adamw(learner.trainable.parameters.values(), config.optim)
        done = 0
        if found:
            state = checkpoint.read_state(found, inputs.identity, config)
            checkpoint.load(found, state, learner.trainable, learner.optimizer)
            done = state.step
        work = Run(config, world, inputs, learner, RunLength(stop, (), ()), Best(), None, [], done, done)
        work.loop(inputs.schedule(config).step, lambda: None)
    return learner


def test_a_trained_thing_from_outside(workplace, tmp_path):
    """Norms are trained and saved beside the adapters, and a resumed run gives the same bits."""
    whole = train(workplace(**{"optim.schedule": "constant"}), 6)
    checkpoints = checkpoint.published(tmp_path / "run" / "checkpoints")
    assert {"adapter_model.safetensors", "norms.safetensors"} <= {path.name for path in checkpoints[-1].iterdir()}
    initial = load_file(next(tmp_path.glob("model-*")) / "model.safetensors")
    assert not torch.equal(whole.model.norm.weight.detach(), initial["model.norm.weight"])

    options = workplace("stopped", **{"optim.schedule": "constant"})
    train(options, 3)
    resumed = train(options, 6, checkpoint.published(tmp_path / "stopped" / "checkpoints")[-1])
    for name, parameter in whole.trainable.parameters.items():
        assert torch.equal(parameter, resumed.trainable.parameters[name]), name


def test_the_set_names_each_parameter_once(save_mistral):
    model = load_model(save_mistral()[0], torch.float32, "cpu")
    norms = Norms(model)
    parameters = TrainableSet([norms]).parameters
    assert list(parameters) == list(norms.parameters()) and TrainableSet([norms]).count == 5 * 64
    with pytest.raises(ValueError, match="trained twice: .*norm.weight"):
        TrainableSet([norms, Norms(model)])


def test_clipping_is_by_the_norm_of_all(save_mistral):
    trainable = TrainableSet([Norms(load_model(save_mistral()[0], torch.float32, "cpu"))])
    for parameter in trainable.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    norm = trainable.clip_gradients(1.0)
    assert norm == pytest.approx((5 * 64) ** 0.5)
    squares = [gradient.square().sum() for gradient in gradients_of(trainable.parameters).values()]
    assert torch.stack(squares).sum().item() == pytest.approx(1, rel=1e-4)
