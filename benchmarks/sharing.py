"""A micro-batch of trees as one of separate documents, each the prompt with one of its answers: what sharing saves."""

import dataclasses
import itertools

import torch

from minorca.data.packing import Batch


def separated(batch: Batch) -> Batch:
    """The same answers, targets and pairs, with a prompt for each answer."""
    tokens, sizes, target_rows = [], [0], []
    rows = iter(batch.target_rows.tolist())
    lengths = iter([] if batch.answers is None else batch.answers.lengths.tolist())
    for (begin, end), starts in zip(itertools.pairwise(batch.cu_seqlens.tolist()), batch.branches):
        for start, stop in itertools.pairwise([*starts, end - begin]):
            document = sizes[-1]
            tokens += [batch.tokens[begin : begin + starts[0]], batch.tokens[begin + start : begin + stop]]
            sizes.append(document + starts[0] + stop - start)
            for row in itertools.islice(rows, next(lengths)):
                place = row - begin
                # the prompt's last token stays where it is, and a branch follows it
                target_rows.append(document + (place if place < starts[0] else place - start + starts[0]))
    return dataclasses.replace(
        batch,
        tokens=torch.cat(tokens),
        cu_seqlens=torch.tensor(sizes),
        target_rows=torch.tensor(target_rows),
        branches=[],
    )
