"""The embedding and the head: matrices with a row for each id, and what is trained of them.

Three things may be, each as PEFT computes it: the rows of new tokens (trainable_token_indices), the whole matrix
(modules_to_save), or a low-rank update. What is trained is fp32, and computation is in the model's dtype. Axes: T
tokens, M rows with a target, H hidden, V vocabulary, N trained rows, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minorca_kernels import DenseWeight, linear_cross_entropy, linear_cross_entropy_and_entropy
from minorca_kernels.dropout import dropout_definition


class TrainedRows(nn.Module):
    """Consecutive rows of a matrix, trained, while the others stay as they are. The matrix holds them rounded."""

    def __init__(self, first: int, count: int, hidden_size: int, device: torch.device):
        super().__init__()
        self.first = first
        self.stop = first + count
        self.values_NH = nn.Parameter(torch.empty(count, hidden_size, dtype=torch.float32, device=device))

    @torch.no_grad()
    def write(self, weight_VH: Tensor) -> None:
        """Rounds them into the matrix: before each forward, for FSDP gathers the matrix anew."""
        # .data: what autograd has saved of other rows stays valid
        weight_VH.data[self.first : self.stop] = self.values_NH

    def embed(self, x_TH: Tensor, tokens_T: Tensor) -> Tensor:
        """Embedded tokens, those of trained rows differentiable in them."""
        index_T = tokens_T - self.first
        is_trained_T = (index_T >= 0) & (tokens_T < self.stop)
        # a row's gradient is a sum over tokens, in fp32
        rows_TH = F.embedding(index_T.where(is_trained_T, 0), self.values_NH.float())
        return torch.where(is_trained_T[:, None], rows_TH.to(x_TH.dtype), x_TH)

    def losses(self, losses_M: Tensor, x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
        """Losses under a matrix that holds the rows, made differentiable in them."""
        return _LossesOfRows.apply(losses_M, self.values_NH, x_MH.detach(), weight_VH, targets_M, self.first)


class _LossesOfRows(torch.autograd.Function):
    """The identity of losses; the gradient of some rows of the head, (softmax - onehot)^T x, without that of all."""

    @staticmethod
    def forward(ctx, losses_M, values_NH, x_MH, weight_VH, targets_M, first):
        ids_N = torch.arange(first, first + len(values_NH), device=targets_M.device)
        logits_MN = F.linear(x_MH, weight_VH[first : first + len(values_NH)]).to(losses_M.dtype)
        # a loss is the logarithm of the sum of all exponentials, less the target's logit
        target_M = torch.bmm(x_MH[:, None], weight_VH[targets_M][:, :, None]).flatten().to(losses_M.dtype)
        gradient_MN = (logits_MN - (losses_M + target_M)[:, None]).exp_() - (targets_M[:, None] == ids_N).float()
        ctx.save_for_backward(gradient_MN, x_MH)
        ctx.dtype = values_NH.dtype
        return losses_M.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        gradient_MN, x_MH = ctx.saved_tensors
        dvalues_NH = (gradient_MN * gradients[0][:, None]).t() @ x_MH.to(gradient_MN.dtype)
        return gradients[0], dvalues_NH.to(ctx.dtype), None, None, None, None


class VocabularyLoRA(nn.Module):
    """A low-rank update: A [R, in], B [out, R], from ids to hidden (embedding) or from hidden to ids (head)."""

    def __init__(
        self,
        sizes: tuple[int, int],
        rank: int,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, sizes[0], dtype=dtype, device=device))
        self.b = nn.Parameter(torch.empty(sizes[1], rank, dtype=dtype, device=device))
        self.scale = scale
        self.dropout = dropout
        # of the next forward's dropout, which only the head has
        self.seed = 0

    def embed(self, tokens_T: Tensor) -> Tensor:
        """What it adds to embedded tokens, in fp32."""
        return F.embedding(tokens_T, self.a.t()).float() @ self.b.t().float() * self.scale

    def extend(self, x_MH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        """x and W with R more columns, so that their product contains the update."""
        dropped_MH = dropout_definition(x_MH, self.dropout, self.seed) if self.training else x_MH
        low_MR = F.linear(dropped_MH.to(x_MH.dtype), self.a.to(x_MH.dtype)) * self.scale
        return torch.cat([x_MH, low_MR], 1), torch.cat([weight_VH, self.b.to(x_MH.dtype)], 1)


class VocabularyMatrix(DenseWeight):
    """A row [H] for each id, which embeds tokens, and of which the head makes logits. A model that ties its embedding
    and head has one for both.

    Attributes:
        dtype: of computation, where the whole matrix is trained; else None.
        rows: trained rows, or None.
        lora: a trained low-rank update, or None.
    """

    def __init__(self, weight_VH: Tensor):
        super().__init__(weight_VH)
        self.dtype: torch.dtype | None = None
        self.rows: TrainedRows | None = None
        self.lora: VocabularyLoRA | None = None

    def train_whole(self) -> None:
        """Has a matrix without memory yet be trained, in fp32."""
        self.dtype = self.weight.dtype
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=torch.float32))

    def _current(self) -> Tensor:
        if self.rows is not None:
            self.rows.write(self.weight)
        return self.weight if self.dtype is None else self.weight.to(self.dtype)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Embeds tokens [T] -> [T, H]."""
        if self.rows is not None:
            return self.rows.embed(F.embedding(tokens_T, self._current()), tokens_T)
        x_TH = F.embedding(tokens_T, self.weight)
        if self.lora is not None:
            return (x_TH + self.lora.embed(tokens_T)).to(x_TH.dtype)
        return x_TH if self.dtype is None else x_TH.to(self.dtype)

    def linear(self, x_TH: Tensor) -> Tensor:
        """Logits [T, V] of hidden states."""
        x_TH, weight_VH = self._with_update(x_TH)
        if self.rows is not None and torch.is_grad_enabled():
            rows = self.rows
            parts = (weight_VH[: rows.first], rows.values_NH.to(weight_VH.dtype), weight_VH[rows.stop :])
            return torch.cat([F.linear(x_TH, part) for part in parts], 1)
        return F.linear(x_TH, weight_VH)

    def losses(self, x_MH: Tensor, targets_M: Tensor) -> Tensor:
        """The cross-entropy [M] of each row of hidden states, in fp32 (`linear_cross_entropy`)."""
        x_MH, weight_VH = self._with_update(x_MH)
        return self._of_rows(linear_cross_entropy(x_MH, weight_VH, targets_M), x_MH, weight_VH, targets_M)

    def losses_and_entropies(self, x_MH: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        """`losses`, and the entropy [M] of each row's distribution, which has no gradient."""
        x_MH, weight_VH = self._with_update(x_MH)
        losses_M, entropies_M = linear_cross_entropy_and_entropy(x_MH, weight_VH, targets_M)
        return self._of_rows(losses_M, x_MH, weight_VH, targets_M), entropies_M

    def _with_update(self, x_MH: Tensor) -> tuple[Tensor, Tensor]:
        """x and W, whose product are the logits."""
        weight_VH = self._current()
        return (x_MH, weight_VH) if self.lora is None else self.lora.extend(x_MH, weight_VH)

    def _of_rows(self, losses_M: Tensor, x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
        return losses_M if self.rows is None else self.rows.losses(losses_M, x_MH, weight_VH, targets_M)
