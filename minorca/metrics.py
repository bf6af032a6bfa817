"""What a run tells: metrics.jsonl, TensorBoard, curves.png, and the FLOPs behind its MFU."""

import json
import os
import resource
from pathlib import Path

import torch

from minorca.architecture import Architecture
from minorca.parallel import World

# dense bf16 matrix FLOP/s, from NVIDIA's data sheets; a device not here has no MFU rather than a guessed one
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def training_flops(arch: Architecture, adapter_parameters: int, lengths: list[int], trained: int) -> float:
    """FLOPs of one forward and backward over documents of these lengths, `trained` tokens of them in the loss; recomputation
    not counted.

    A token costs 4 FLOPs a frozen matrix parameter (forward, and the gradient of activations) and 6 an adapter parameter;
    attention 4 D a query head and visible key forward, and 2.5 times that backward. The head meets trained tokens alone.
    """
    attended, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    block = arch.hidden_size * (2 * attended + 2 * kv + 3 * arch.intermediate_size)
    pairs = 0
    for n in lengths:
        w = min(n, arch.window or n)
        pairs += w * (w + 1) // 2 + (n - w) * w
    tokens = (4 * arch.layers * block + 6 * adapter_parameters) * sum(lengths)
    return tokens + 4 * arch.vocab_size * arch.hidden_size * trained + 3.5 * 4 * attended * arch.layers * pairs


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Record:
    """A run's record, kept by rank 0: metrics.jsonl (a line a step, flushed at once), TensorBoard, a progress bar."""

    def __init__(self, output: Path, resumed: int, steps: int, log_every: int):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path, self.log_every = output / "metrics.jsonl", log_every
        _drop_lines_past(self.path, resumed or -1)  # starting over, the evaluation before step 1 too
        self.file = self.path.open("a")
        self.board = SummaryWriter(output / "tensorboard", purge_step=resumed + 1)
        self.bar = tqdm(total=steps, initial=resumed, unit="step", desc="training")

    def _write(self, step: int, values: dict) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, trained: int, seconds: float, mfu: float | None, world: World) -> None:
        """A step of all ranks together: its loss per trained token, its own tokens, its wall-clock seconds."""
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "trained_tokens": trained,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": mfu,
            "peak_memory_bytes": peak_memory_bytes(world.device),
        }
        self._write(step, values)
        self.bar.update()
        if step % self.log_every == 0 or step == self.bar.total:
            self.bar.set_postfix(loss=f"{loss:.4f}", tokens_per_second=f"{tokens / seconds:,.0f}")

    def evaluation(self, step: int, eval_loss: float) -> None:
        self._write(step, {"eval_loss": eval_loss})
        self.bar.write(f"step {step}: held-out loss {eval_loss:.4f}")

    def close(self) -> None:
        """Ends the record with curves.png, drawn from the whole of metrics.jsonl."""
        self.bar.close()
        self.file.close()
        self.board.close()
        draw_curves(self.path, self.path.with_name("curves.png"))


def _drop_lines_past(path: Path, step: int) -> None:
    """Removes what an interrupted run wrote after its last checkpoint, a torn last line included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss (training, smoothed, held-out), learning rate and tokens/s over the steps of a metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    train, held_out = ([line for line in lines if key in line] for key in ("loss", "eval_loss"))
    steps = [line["step"] for line in train]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate, speed = figure.subplots(1, 3)
    memory, smoothed = max(0, 1 - 10 / max(1, len(train))), []  # averages over about a tenth of the run
    for line in train:
        smoothed.append(memory * smoothed[-1] + (1 - memory) * line["loss"] if smoothed else line["loss"])
    loss.plot(steps, [line["loss"] for line in train], color="tab:blue", alpha=0.35, label="training")
    loss.plot(steps, smoothed, color="tab:blue", label="training, smoothed")
    if held_out:
        loss.plot([line["step"] for line in held_out], [line["eval_loss"] for line in held_out], "o-", color="tab:orange", label="held out")
    loss.legend()
    rate.plot(steps, [line["lr"] for line in train])
    speed.plot(steps, [line["tokens_per_second"] for line in train])
    for axis, title in ((loss, "loss (nats per trained token)"), (rate, "learning rate"), (speed, "tokens per second")):
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
