"""Trains the decoder of model.py on packed rows: what both training programs share.

SPDX-License-Identifier: Apache-2.0

Sequences lie end to end in a row of tokens of one fixed length, so that XLA compiles
one program; `cu_seqlens` keeps them apart in the attention. Norms, rotary embedding,
activation and attention, and the gradients of all of them, are custom calls of that
program, which computes loss, backward and the optimizer's step.
"""

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import xla_ops
from model import Decoder

IGNORE = -100  # label that the loss skips


class Batch(NamedTuple):
    """Packed sequences. Padding is one more sequence, of which no label counts.

    Attributes:
      token_ids: int32 [num_tokens].
      positions: int64 [num_tokens], the place of each token in its sequence.
      labels: int64 [num_tokens], the token that comes next, or IGNORE.
      cu_seqlens: int32 [max_seqs + 2], where each sequence begins; those that there
        are not are empty.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(t.to(device) for t in self))


def pack(rows: Sequence[Sequence[int]], num_tokens: int, max_seqs: int) -> Batch:
    """Packs sequences, of at most num_tokens tokens and max_seqs in all."""
    if len(rows) > max_seqs or sum(map(len, rows)) > num_tokens:
        raise ValueError(
            f"pack: rows must be at most {max_seqs} of {num_tokens} tokens in all, got "
            f"{len(rows)} of {sum(map(len, rows))}"
        )
    ids = torch.zeros(num_tokens, dtype=torch.int32)
    positions = torch.zeros(num_tokens, dtype=torch.int64)
    labels = torch.full((num_tokens,), IGNORE)
    ends = [0]
    for row in rows:
        first, last = ends[-1], ends[-1] + len(row)
        ids[first:last] = torch.tensor(row)
        positions[first:last] = torch.arange(len(row))
        labels[first : last - 1] = torch.tensor(row[1:])
        ends.append(last)
    ends += [num_tokens] * (max_seqs + 2 - len(ends))
    return Batch(ids, positions, labels, torch.tensor(ends, dtype=torch.int32))


def batches(
    rows: Sequence[Sequence[int]], num_tokens: int, max_seqs: int, shuffle: bool = True
) -> Iterator[Batch]:
    """Yields all rows, packed one after the other as far as they fit."""
    order = list(rows)
    if shuffle:
        random.shuffle(order)
    taken: list[Sequence[int]] = []
    for row in order:
        if len(taken) == max_seqs or sum(map(len, taken)) + len(row) > num_tokens:
            yield pack(taken, num_tokens, max_seqs)
            taken = []
        taken.append(row)
    if taken:
        yield pack(taken, num_tokens, max_seqs)


def loss_of(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """The mean negative log-likelihood of the labels that count, in nats."""
    x = decoder.model.embed_tokens(batch.token_ids)
    residual: torch.Tensor | None = None
    for layer in decoder.model.layers:
        x, residual = decoder.add_norm(layer.input_layernorm, x, residual)
        x = _attend(layer.self_attn, x, decoder.cos_sin_cache, batch)
        x, residual = decoder.add_norm(layer.post_attention_layernorm, x, residual)
        x = layer.mlp(x)
    x, _ = decoder.add_norm(decoder.model.norm, x, residual)
    return F.cross_entropy(decoder.logits(x), batch.labels, ignore_index=IGNORE)


def _attend(attention, x: torch.Tensor, cos_sin_cache, batch: Batch) -> torch.Tensor:
    query, key, value = attention.project(x, cos_sin_cache, batch.positions)
    num_tokens = x.shape[0]  # no sequence is longer
    window = attention.sliding_window
    out, _ = xla_ops.flash_attn_varlen(
        *(query, key, value, batch.cu_seqlens, batch.cu_seqlens),
        *(num_tokens, num_tokens),
        softmax_scale=attention.head_dim**-0.5,
        is_causal=True,
        window_left=-1 if window is None else window - 1,
    )
    return attention.o_proj(out.reshape(num_tokens, -1))


def start_xla(device: str) -> torch.device:
    """Returns XLA's device; before it the process has none."""
    os.environ["PJRT_DEVICE"] = device.upper()
    import torch_xla

    return torch_xla.device()


def train(
    decoder: Decoder,
    parameters: Iterable[torch.nn.Parameter],
    steps: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    report: Callable[[torch.Tensor], None] = lambda loss: None,
    max_norm: float = 1.0,
) -> list[float]:
    """Trains the parameters, a step for each batch, and returns the losses.

    Args:
      report: called after each step with its loss, a tensor whose value has not been
        waited for.

    Raises:
      ValueError: a loss is infinite or no number, and so are the parameters.
    """
    import torch_xla

    parameters = list(parameters)
    device = parameters[0].device
    losses = []
    for batch in steps:
        loss = loss_of(decoder, batch.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if device.type == "xla":
            torch_xla.sync()
        report(losses[-1])
    found = [loss.item() for loss in losses]
    for step, value in enumerate(found, 1):
        if not math.isfinite(value):
            fix = "lower --lr" if step > 1 else "the model as it was gives no other"
            raise ValueError(
                f"train: loss must be finite, got {value} at step {step}: {fix}"
            )
    return found


@torch.no_grad()
def mean_loss(decoder: Decoder, steps: Iterable[Batch]) -> float:
    """Over the tokens of all batches."""
    device = decoder.cos_sin_cache.device
    total, count = 0.0, 0
    for batch in steps:
        num_labels = int((batch.labels != IGNORE).sum())
        total += loss_of(decoder, batch.to(device)).item() * num_labels
        count += num_labels
    return total / max(1, count)


def plot(losses: Sequence[float], path: Path) -> None:
    """Writes the loss of each step as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats a token", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
