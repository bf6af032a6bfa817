"""A stored NF4 weight (nf4.py), read back into rows of any stride: codes and both levels of absmax in one pass.

A stored weight is a list of tensors, all of them bytes (uint8):

- codes [N, K/2].
- absmax [N, K/64], or without double quantization, as fp32, [N, K/16].
- tables [272, 4]: the fp32 values of the 16 codes and of the 256 codes of an absmax.
- nested absmax [B, 4], fp32, of the blocks of 256 absmax values; each part of a stacked weight begins a block.
- part table [P, 12], of each part int32: its first row, its first nested block, and the bits of its fp32 offset.

The last two are there with double quantization only. Axes: N out, K in, P parts, B nested blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.nf4 import (
    BLOCK,
    CODE_BOOK,
    DYNAMIC_MAP,
    NESTED_BLOCK,
    dequantize_nf4_definition,
)
from minorca_kernels.operator import operator

# of 64 weights that a program of 4 warps reads back: 32 registers a thread, so that a multiprocessor is full
BLOCKS = 64
# rows that the CPU reads back at once
CPU_ROWS = 1024


def tables(device: torch.device | str | None = None) -> Tensor:
    """The tables of a stored weight."""
    values = torch.tensor([*CODE_BOOK, *DYNAMIC_MAP], dtype=torch.float32, device=device)
    return values[:, None].view(torch.uint8)


def nested_parts(nested_absmax: Tensor, part_table: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The nested absmax values of each part, and its offset."""
    table = part_table.detach().view(torch.int32)
    values = nested_absmax.detach().view(torch.float32).view(-1).tensor_split(table[1:, 1].tolist())
    return list(zip(values, table[:, 2].view(torch.float32)))


def _dequantize_cpu(out_NK: Tensor, weight: list[Tensor]) -> None:
    codes, absmax, _, *nested = weight
    # not part by part: in a plan, on fake tensors, the parts' sizes are not known
    for start in range(0, len(codes), CPU_ROWS):
        rows = slice(start, start + CPU_ROWS)
        scales = _scales(absmax, *nested, rows) if nested else absmax[rows].view(torch.float32)
        out_NK[rows].copy_(
            dequantize_nf4_definition(codes[rows], scales.reshape(-1), out_NK.dtype).view_as(out_NK[rows])
        )


def _scales(absmax: Tensor, nested_absmax: Tensor, part_table: Tensor, rows: slice) -> Tensor:
    """The absmax of rows of all parts, fp32 [rows, K/64]; as `dequantize_absmax_definition`."""
    codes = absmax[rows]
    table = part_table.view(torch.int32)
    number = torch.arange(rows.start, rows.start + len(codes), dtype=torch.int32)
    part = torch.bucketize(number, table[:, 0].contiguous(), right=True) - 1
    block = (number - table[part, 0])[:, None] * codes.shape[1] + torch.arange(codes.shape[1])
    nested = table[part, 1][:, None] + block // NESTED_BLOCK
    values = torch.tensor(DYNAMIC_MAP, dtype=torch.float32).index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return values * nested_absmax.view(torch.float32).view(-1)[nested] + table[:, 2].view(torch.float32)[part][:, None]


# ------------------------------------------------------------------------------------------------------------ Triton
# A program takes a quarter of a nested block, whose absmax and part it finds once. A thread loads 16 bytes of codes,
# and stores 8 weights of a block at a time, 16 bytes in bf16.


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    tables_ptr,
    nested_ptr,
    part_table_ptr,
    out_ptr,
    rows,
    stride_out,
    ROW_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCKS
    end = rows * ROW_BLOCKS
    if PARTS > 0:
        nested = first // NESTED_BLOCK
        start, first_nested, offset = 0, 0, 0.0
        for part in tl.static_range(PARTS):
            entry_ptr = part_table_ptr + 3 * part
            inside = nested >= tl.load(entry_ptr + 1)
            start = tl.where(inside, tl.load(entry_ptr) * ROW_BLOCKS, start)
            first_nested = tl.where(inside, tl.load(entry_ptr + 1), first_nested)
            offset = tl.where(inside, tl.load(entry_ptr + 2).to(tl.float32, bitcast=True), offset)
            next_start = tl.load(entry_ptr + 3) * ROW_BLOCKS if part + 1 < PARTS else rows * ROW_BLOCKS
            end = tl.where(inside, next_start, end)
        # a part's last nested block may end after the part
        first += start - first_nested * NESTED_BLOCK
    block = first + tl.arange(0, BLOCKS)
    mask = block < end
    word = tl.arange(0, BLOCKS * 8)
    # of 8 codes
    words = tl.load(codes_ptr + first.to(tl.int64) * 8 + word, mask=first * 8 + word < end * 8, other=0)
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if PARTS > 0:
        scale = tl.load(tables_ptr + 16 + scale.to(tl.int32)) * tl.load(nested_ptr + nested) + offset
    # the first code of a byte is its high half
    shift = 4 * (tl.arange(0, 8) ^ 1)
    code = (words[:, None] >> shift[None, :]) & 15
    # from shared memory
    value = tl.gather(tl.load(tables_ptr + tl.arange(0, 16)), code.reshape(BLOCKS * 64), 0).reshape(BLOCKS, 64)
    row_ptr = out_ptr + (block // ROW_BLOCKS).to(tl.int64) * stride_out + block % ROW_BLOCKS * 64
    tl.store(row_ptr[:, None] + tl.arange(0, 64)[None, :], value * scale[:, None], mask=mask[:, None])


def _dequantize_triton(out_NK: Tensor, weight: list[Tensor]) -> None:
    codes, absmax, tables, *nested = weight
    rows, row_blocks = len(codes), out_NK.shape[1] // BLOCK
    if nested:
        nested_absmax, part_table = nested
        blocks = len(nested_absmax) * NESTED_BLOCK
        pointers = absmax, tables.view(torch.float32), nested_absmax.view(torch.float32), part_table.view(torch.int32)
    else:
        blocks = rows * row_blocks
        pointers = absmax.view(torch.float32), tables.view(torch.float32), None, None
    _dequantize_kernel[(triton.cdiv(blocks, BLOCKS),)](
        codes.view(torch.int32),
        *pointers,
        out_NK,
        rows,
        out_NK.stride(0),
        ROW_BLOCKS=row_blocks,
        PARTS=len(nested[1]) if nested else 0,
        NESTED_BLOCK=NESTED_BLOCK,
        BLOCKS=BLOCKS,
        num_warps=4,
        # a scale is rounded after the product and after the sum
        enable_fp_fusion=False,
    )


_dequantize_nf4 = operator(
    "dequantize_nf4(Tensor(a!) out, Tensor[] weight) -> ()",
    cuda=_dequantize_triton,
    cpu=_dequantize_cpu,
    fake=lambda out, weight: None,
)


def dequantize_nf4(weight: list[Tensor], dtype: torch.dtype, scratch: int = 0) -> Tensor:
    """A stored weight -> W [N, K], a view of rows that have so many scratch columns, not initialized, after each."""
    codes = weight[0]
    columns = 2 * codes.shape[1]
    out_NK = codes.new_empty(len(codes), columns + scratch, dtype=dtype)[:, :columns]
    _dequantize_nf4(out_NK, weight)
    return out_NK
