"""Draws the figures of docs/inside.md: python docs/figures/draw.py [DIRECTORY]

What they show is what the code does: masks are PackedAttention's, micro-batches are the schedule's, pages are those
that the engine has taken, and kernels are those that a training step launches on a fake GPU. The same code draws the
same bytes; a test compares them.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np
import torch

STYLE = """
    text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
    .title { font-weight: 600; }
    .small { font-size: 11px; fill: #59636e; }
    .code { font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328; }
    .middle { text-anchor: middle; }
    .end { text-anchor: end; }
    .page { fill: #ffffff; stroke: #d1d9e0; }
    .line { fill: none; stroke: #818b98; }
    .none { fill: #f6f8fa; stroke: #d1d9e0; }
    .a { fill: #b6e3ff; stroke: #0969da; }
    .b { fill: #aceebb; stroke: #1a7f37; }
    .c { fill: #fae17d; stroke: #9a6700; }
    .d { fill: #e8cbfd; stroke: #8250df; }
    .self { stroke-width: 2; }
    @media (prefers-color-scheme: dark) {
      text, .code { fill: #f0f6fc; }
      .small { fill: #9198a1; }
      .page { fill: #0d1117; stroke: #3d444d; }
      .line { stroke: #656c76; }
      .none { fill: #151b23; stroke: #3d444d; }
      .a { fill: #0c4a8a; stroke: #58a6ff; }
      .b { fill: #14602b; stroke: #3fb950; }
      .c { fill: #6a4b06; stroke: #d29922; }
      .d { fill: #553098; stroke: #ab7df8; }
    }
"""
COLOURS = "abcd"


class Drawing:
    """An SVG in the style of the other figures, for light and dark pages."""

    def __init__(self, title: str, description: str, width: int, height: int):
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"  <title>{escape(title)}</title>",
            f"  <desc>{escape(description)}</desc>",
            f"  <style>{STYLE}  </style>",
        ]
        self.rect(0.5, 0.5, width - 1, height - 1, "page", 8)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 0) -> None:
        rx = f' rx="{radius:g}"' if radius else ""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.lines.append(f'  <rect class="{kind}" {place}{rx}/>')

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        of_class = f' class="{kind}"' if kind else ""
        self.lines.append(f'  <text{of_class} x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def line(self, *points: tuple[float, float]) -> None:
        path = "M" + " ".join(f"{x:g} {y:g}" for x, y in points)
        self.lines.append(f'  <path class="line" d="{path}"/>')

    @property
    def svg(self) -> str:
        return "\n".join([*self.lines, "</svg>"]) + "\n"


# ------------------------------------------------------------------------------------------------------------ packing


def packing() -> str:
    """Rows of a data set, and the micro-batches of the first step."""
    from minorca.data.packing import BatchSchedule
    from minorca.model.attention import PackedAttention

    lengths, capacity, unit = [9, 5, 12, 3, 7, 4, 6, 2], 16, 20
    schedule = BatchSchedule(np.array(lengths), capacity, micro_batches=3, packing=True, seed=0)
    step = schedule.step(1)
    drawing = Drawing(
        "Packing",
        "Eight rows of different lengths fill three micro-batches of at most 16 tokens, whole and end to end.",
        760,
        400,
    )
    drawing.text(20, 30, "Rows, as they are rendered once", "title")
    for row, length in enumerate(lengths):
        drawing.text(20, 61 + 40 * row, f"row {row}")
        drawing.rect(66, 44 + 40 * row, 0.8 * unit * length, 26, "none", 4)
        drawing.text(74 + 0.8 * unit * length, 61 + 40 * row, str(length), "small")
    drawing.text(330, 30, f"A step: micro-batches of at most {capacity} tokens", "title")
    for index, rows in enumerate(step):
        y = 60 + 112 * index
        packed = [lengths[row] for row in rows]
        starts = torch.tensor([0, *itertools.accumulate(packed)])
        attend = PackedAttention(starts, sum(packed), None, torch.device("cpu"))
        drawing.rect(330, y, unit * capacity, 30, "none")
        for place, (row, start, length) in enumerate(zip(rows, attend.cu_seqlens.tolist(), packed)):
            drawing.rect(330 + unit * start, y, unit * length, 30, COLOURS[place])
            drawing.text(330 + unit * (start + length / 2), y + 20, f"row {row}", "middle")
            for token, position in enumerate(attend.positions[start : start + length].tolist()):
                drawing.text(330 + unit * (start + token + 0.5), y + 46, str(position), "small middle")
        drawing.text(662, y + 20, f"{sum(packed)} of {capacity}", "small")
        drawing.text(662, y + 46, "positions", "small")
        drawing.text(330, y + 66, f"cu_seqlens {attend.cu_seqlens.tolist()}", "code")
    return drawing.svg


# -------------------------------------------------------------------------------------------------------------- masks


def window() -> str:
    """Which keys a query sees: two documents, the same with a window, and a tree."""
    from minorca.model.attention import PackedAttention

    cpu, cell, top = torch.device("cpu"), 17, 92
    lengths, width = [8, 6], 4
    tokens = sum(lengths)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    branches = [[5, 8]]
    panels: list[tuple[str, str, PackedAttention, list[int]]] = [
        ("Two documents", "each sees itself alone", PackedAttention(starts, tokens, None, cpu), lengths),
        (
            f"A window of W = {width}",
            "the query's own key is one",
            PackedAttention(starts, tokens, width, cpu),
            lengths,
        ),
        (
            "A tree",
            "a prompt and two answers",
            PackedAttention(torch.tensor([0, 12]), 12, None, cpu, branches=branches),
            [5, 3, 4],
        ),
    ]
    drawing = Drawing(
        "Which keys a query sees",
        "Three masks: two documents in a batch, the same with a sliding window of four keys, and a prompt with two "
        "answers that do not see each other.",
        860,
        380,
    )
    for panel, (title, below, attend, parts) in enumerate(panels):
        left = 62 + 275 * panel
        seen = visible_keys(attend)
        drawing.text(left, 30, title, "title")
        drawing.text(left, 48, below, "small")
        drawing.text(left, top - 22, "keys", "small")
        colours = "".join(COLOURS[part] * length for part, length in enumerate(parts))
        for query, row in enumerate(seen):
            drawing.text(left - 8, top + cell * query + 13, str(int(attend.positions[query])), "small end")
            drawing.text(left + cell * (query + 0.5), top - 6, str(int(attend.positions[query])), "small middle")
            for key, sees in enumerate(row):
                kind = f"{colours[key]}{' self' if key == query else ''}" if sees else "none"
                drawing.rect(left + cell * key, top + cell * query, cell - 2, cell - 2, kind)
        counts = [sum(row) for row in seen]
        drawing.text(left, top + cell * len(seen) + 20, f"at most {max(counts)} keys a query", "small")
    drawing.text(14, top + 13, "query", "small")
    return drawing.svg


def visible_keys(attend) -> list[list[bool]]:
    """[T][T] whether the query sees the key, by what our kernels are given."""
    first, tokens = attend.first.tolist(), len(attend.first)
    hidden = attend.tree[:2].T.tolist() if attend.tree is not None else [[0, 0]] * tokens
    return [
        [first[query] <= key <= query and not hidden[query][0] <= key < hidden[query][1] for key in range(tokens)]
        for query in range(tokens)
    ]


# -------------------------------------------------------------------------------------------------------------- cache


def small_model(window: int | None):
    """A small network with random weights."""
    from minorca.model.architecture import read_architecture
    from minorca.model.build import build_model

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 512, "rms_norm_eps": 1e-5}
    sizes |= {"num_hidden_layers": 1, "max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": window}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(sizes | {"tie_word_embeddings": False}))
        arch = read_architecture(directory)
    model = build_model(arch, torch.float32).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    return model


def filled_slots(prompts: list[list[int]], new_tokens: int, window: int | None) -> list[tuple[int, list[int]]]:
    """Of each prompt's slot, once all have so many new tokens: its length, and its pages by place, 0 where the window
    has passed.
    """
    from minorca.generate.engine import Engine
    from minorca.generate.request import Request

    most = 4 * new_tokens
    engine = Engine(small_model(window), len(prompts), max(map(len, prompts)) + most)
    counts = {Request(prompt, most): 0 for prompt in prompts}
    for request in counts:
        engine.add(request)
    while min(counts.values()) < new_tokens:
        for token in engine.step():
            counts[token.request] += 1
    return [(slot.length, slot.pages) for slot in engine.cache._slots]


def cache() -> str:
    """Pages of three sequences that begin alike, and of one with a window."""
    from minorca.generate.kv_cache import PAGE

    shared = [1 + n % 500 for n in range(2 * PAGE)]
    prompts = [shared + [2 + k] * own for k, own in enumerate((90, 150, 30))]
    drawing = Drawing(
        "The key/value cache in pages",
        "Three sequences whose prompts begin with the same 256 tokens have their first two pages in common. A sequence "
        "with a window gives back the pages that its window has passed.",
        800,
        460,
    )
    drawing.text(
        20, 30, f"Three sequences with the same first {len(shared)} tokens: pages of {PAGE} positions", "title"
    )
    slots = filled_slots(prompts, 8, None)
    entries = [page for _, pages in slots for page in pages]
    for number, (length, pages) in enumerate(slots):
        y = 52 + 48 * number
        drawing.text(20, y + 22, f"slot {number}: {length} tokens")
        shared = [entries.count(page) > 1 for page in pages]
        draw_pages(drawing, 180, y, length, pages, shared, COLOURS[1 + number])
    told = f"{len(entries)} entries in the tables, {len(set(entries))} pages of memory; blue: shared"
    drawing.text(20, 212, told, "small")
    window = 2 * PAGE
    drawing.text(20, 260, f"One sequence that grows, with a window of {window} keys", "title")
    for place, new in enumerate((8, 90, 200)):
        ((length, pages),) = filled_slots([prompts[0]], new, window)
        y = 282 + 48 * place
        drawing.text(20, y + 22, f"{length} tokens")
        draw_pages(drawing, 180, y, length, pages, [False] * len(pages), COLOURS[1])
    drawing.text(20, 442, "grey: given back, since no later query sees a key of it", "small")
    return drawing.svg


def draw_pages(
    drawing: Drawing, x: float, y: float, length: int, pages: list[int], shared: list[bool], kind: str
) -> None:
    """The pages of a sequence; the last one is filled as far as it has tokens."""
    from minorca.generate.kv_cache import PAGE

    width = 110
    for place, page in enumerate(pages):
        left = x + (width + 8) * place
        filled = min(length - place * PAGE, PAGE) / PAGE
        drawing.rect(left, y, width, 34, "none", 4)
        if page:
            drawing.rect(left, y, round(width * filled, 1), 34, COLOURS[0] if shared[place] else kind, 4)
        drawing.text(left + width / 2, y + 22, f"page {page}" if page else "given back", "middle")


# ------------------------------------------------------------------------------------------------------------ kernels


def kernels() -> str:
    """The kernels of one block's forward in training, with what each moves and computes."""
    from benchmarks.fake_runs import Training, architecture, train
    from minorca.plan.rates import Prediction, Rates
    from minorca.train.metrics import visible_pairs

    documents = [4096] * 2
    recorded = train(Training(layers=3, lengths=documents))
    launches = [launch for launch in recorded.recorder.launches if launch.phase == "forward"]
    # each block but the first begins with this operation, and has another one before its MLP
    norms = [place for place, launch in enumerate(launches) if launch.owner == "add_rms_norm"]
    block = launches[norms[1] : norms[3]]
    arch = architecture(3)
    attention = 4.0 * arch.heads * arch.head_dim * visible_pairs(documents, arch.window)
    rates = Rates()
    prediction = Prediction(recorded.launches, rates, attention)
    rows = []
    for launch in block:
        flops = attention if launch.owner == "attention" else launch.flops
        seconds = prediction.seconds(launch)
        is_bound = seconds > rates.launch + 1.001 * launch.bytes / (rates.of_copy * rates.copy)
        rows.append((*describe(launch), launch.bytes, flops, seconds, is_bound))
    height = 118 + 24 * len(rows) + 62
    tokens = sum(documents)
    drawing = Drawing(
        "The kernels of one block",
        f"The {len(rows)} kernels of one block's forward on {tokens} tokens, the bytes that each reads and writes, its "
        "floating-point operations and its computed time.",
        920,
        height,
    )
    drawing.text(20, 30, f"One block's forward in training: {len(rows)} kernels", "title")
    shape = f"{tokens:,} tokens of Mistral 7B in bf16, two documents, LoRA of rank 16 on all projections"
    drawing.text(20, 50, shape, "small")
    drawing.text(
        20, 68, "Computed, not measured: bytes and FLOPs as recorded on a fake GPU, rates assumed of an H100", "small"
    )
    for x, head in ((500, "MB"), (575, "GFLOP"), (640, "µs")):
        drawing.text(x, 98, head, "small end")
    longest = max(row[4] for row in rows)
    for place, (name, what, size, flops, seconds, is_bound) in enumerate(rows):
        y = 118 + 24 * place
        drawing.text(20, y, name, "code")
        drawing.text(150, y, what, "small")
        drawing.text(500, y, f"{size / 1e6:,.1f}", "small end")
        drawing.text(575, y, f"{flops / 1e9:,.1f}" if flops else "", "small end")
        drawing.text(640, y, f"{1e6 * seconds:,.0f}", "small end")
        drawing.rect(656, y - 12, round(max(240 * seconds / longest, 1), 1), 15, "b" if is_bound else "a", 2)
    y = 118 + 24 * len(rows)
    drawing.line((20, y - 14), (900, y - 14))
    totals = [sum(row[column] for row in rows) for column in (2, 3, 4)]
    drawing.text(20, y + 6, "together", "title")
    drawing.text(500, y + 6, f"{totals[0] / 1e6:,.0f}", "small end")
    drawing.text(575, y + 6, f"{totals[1] / 1e9:,.0f}", "small end")
    drawing.text(640, y + 6, f"{1e6 * totals[2]:,.0f}", "small end")
    drawing.rect(20, y + 26, 15, 12, "b", 2)
    drawing.text(42, y + 36, "limited by arithmetic", "small")
    drawing.rect(190, y + 26, 15, 12, "a", 2)
    drawing.text(212, y + 36, "limited by memory", "small")
    return drawing.svg


def describe(launch) -> tuple[str, str]:
    """A kernel's operation, and what it does; of products the sizes."""
    from minorca.plan.rates import WEIGHT

    # SwiGLU is computed before the product that it enters
    if launch.owner == "lora_linear" and launch.name == "_forward_kernel":
        return "swiglu", "of gate and up"
    if launch.name == "copy_":
        return launch.owner, "x A^T copied beside x"
    if launch.name in ("mm", "addmm_"):
        first, second = launch.shapes[-3:-1] if launch.name == "mm" else launch.shapes[1:3]
        sizes = f"[{first[0]}, {first[1]}] x [{second[0]}, {second[1]}]"
        what = "x A^T" if second[1] < WEIGHT else "(x A^T) B^T" if first[1] < WEIGHT else "x W^T"
        if what == "x W^T" and first[1] % 1024:
            what = "[x, x A^T] [W, B]^T"
        return launch.owner, f"{what}: {sizes}"
    whats = {"add_rms_norm": "residual sum and norm", "rope": "queries and keys rotated", "attention": "in tiles"}
    return launch.owner, whats.get(launch.owner, "")


def main(directory: Path) -> None:
    for draw in (packing, window, cache, kernels):
        (directory / f"{draw.__name__}.svg").write_text(draw())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
