"""Several adapters beside one base, each row of a batch with its own or none.

All adapters' A lie side by side in one product, what is not a row's own is made zero, and B gathers: two small products a
projection, whichever rows use which adapter. With none in use they are left out. Source of the idea of one batch for many
adapters: Chen et al. 2023 (Punica, arXiv:2310.18547).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minorca.errors import UserError
from minorca.model.build import build_model
from minorca.model.lora import GROUPS, LoRALinear, adapter_parameters, add_adapters, load_adapter, read_adapter_settings
from minorca.model.network import Mistral, SwiGLULinear
from minorca_kernels import swiglu

NONE = -1  # the place of rows without an adapter


class Adapters:
    """A model's adapters by name, and which one the rows of the next forward use."""

    def __init__(self, names: list[str], device: torch.device):
        self.names, self.in_use = names, False
        self.place_T1 = torch.full((1, 1), NONE, device=device)

    def place(self, name: str | None) -> int:
        return NONE if name is None else self.names.index(name)

    def choose(self, place_T: Tensor, in_use: bool) -> None:
        """place [T], or [1] for all rows: what `place` gave. in_use: whether any row has one."""
        self.place_T1, self.in_use = place_T[:, None], in_use


class MultiLoRALinear(nn.Module):
    """A projection whose rows each add their own adapter's update."""

    def __init__(self, linear: nn.Linear, adapters: Adapters, parts: list[tuple[int, LoRALinear]]):
        super().__init__()
        self.adapters, self.of_swiglu = adapters, isinstance(linear, SwiGLULinear)
        self.base = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        self.base.weight = linear.weight
        matrices = [(place, part.scale, part.rows[t], part.a[t], part.b[t]) for place, part in parts for t in part.rows]
        widths = [len(a) for _, _, _, a, _ in matrices]
        self.a_RK = torch.cat([a.detach() for _, _, _, a, _ in matrices])
        self.b_NR = self.a_RK.new_zeros(linear.out_features, sum(widths))
        self.owner_R = (
            torch.tensor([place for place, *_ in matrices]).repeat_interleave(torch.tensor(widths)).to(self.a_RK.device)
        )
        self.scale_R = (
            torch.tensor([scale for _, scale, *_ in matrices])
            .repeat_interleave(torch.tensor(widths))
            .to(self.a_RK.device)
        )
        for columns, (_, _, (start, stop), _, b) in zip(self.b_NR.split(widths, dim=1), matrices):
            columns[start:stop] = b.detach()

    def forward(self, x_TK: Tensor) -> Tensor:
        x_TK = swiglu(x_TK) if self.of_swiglu else x_TK
        y_TN = self.base(x_TK)
        if not self.adapters.in_use:
            return y_TN
        own_TR = torch.where(self.adapters.place_T1 == self.owner_R, self.scale_R, 0)
        return y_TN.addmm_((F.linear(x_TK, self.a_RK) * own_TR).to(x_TK.dtype), self.b_NR.t())


def load_adapters(model: Mistral, directories: dict[str, str | Path]) -> Adapters:
    """Puts PEFT adapters, by name, beside a model's projections, in the model's dtype.

    Raises:
        UserError: what is wrong with which file.
    """
    weight = model.embedding.weight
    adapters, parts = Adapters(list(directories), weight.device), {}
    for place, directory in enumerate(directories.values()):
        shadow = build_model(model.arch, weight.dtype)
        add_adapters(shadow, read_adapter_settings(directory), weight.dtype)
        for layer, block in enumerate(shadow.layers):
            for group in GROUPS:
                if isinstance(part := getattr(block, group), LoRALinear):
                    part.a.to_empty(device=weight.device), part.b.to_empty(device=weight.device)
                    parts.setdefault((layer, group), []).append((place, part))
        load_adapter(shadow, directory)
        for name, parameter in adapter_parameters(shadow).items():
            if not parameter.isfinite().all():  # 0 times what is no number would reach the rows that do not use it
                raise UserError(
                    f"{name} holds numbers that are infinite or none; was its training stopped by them?", path=directory
                )
    for (layer, group), held in parts.items():
        setattr(model.layers[layer], group, MultiLoRALinear(getattr(model.layers[layer], group), adapters, held))
    return adapters
