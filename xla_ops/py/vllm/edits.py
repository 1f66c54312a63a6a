"""What a step changes at single (row, token) pairs, packed for `sampling.edit`.

Biases and penalties are edits; bad words and the stop tokens of min_tokens are bans.
vLLM builds tensors of whole token histories every step. Here each request's tokens are
counted once, as they come.

Tested by tests/engine/test_sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from .sampling import ALWAYS, COUNT_SHIFT, IN_PROMPT

# (edits, bans) of the programs. A step takes the first that holds it, or several of
# the last; no row is divided that fits into one.
SIZES = ((1024, 1024), (16384, 1024), (131072, 1024))
# vLLM's mark of a token that has been sampled and not been fetched.
PENDING = -1

# Given an output whose last token is pending, which row of the last step sampled it.
SourceOf = Callable[[list[int]], int | None]
# (row, token, condition)
Ban = tuple[int, int, int]


class Round(NamedTuple):
    """One call of `sampling.edit`."""

    num_edits: int
    num_bans: int
    packed: np.ndarray


class _History:
    """The distinct tokens of a request and their counts, kept up to date."""

    def __init__(self, output: list[int], prompt: np.ndarray | None):
        self.output = output  # keeps its id taken
        distinct = np.zeros(0, np.int32) if prompt is None else prompt
        self.size = distinct.size
        self.tokens = np.empty(max(64, 2 * self.size), np.int32)
        self.counts = np.full(self.tokens.size, IN_PROMPT, np.int32)
        self.tokens[: self.size] = distinct
        self.place = {int(token): i for i, token in enumerate(distinct)}
        self.seen = 0
        self.latest = PENDING

    def follows(self, known: int) -> bool:
        """Whether the output still begins with what was counted."""
        if not self.seen:
            return True
        return known >= self.seen and self.output[self.seen - 1] == self.latest

    def update(self, known: int) -> None:
        for token in self.output[self.seen : known]:
            at = self.place.get(token)
            if at is None:
                at = self.place[token] = self.size
                if at == self.tokens.size:
                    self.tokens = np.resize(self.tokens, 2 * at)
                    self.counts = np.resize(self.counts, 2 * at)
                self.tokens[at], self.counts[at] = token, 0
                self.size += 1
            self.counts[at] += 1 << COUNT_SHIFT
            self.latest = token
        self.seen = known


class _Row(NamedTuple):
    row: int
    penalties: tuple[float, float, float]
    source: int
    tokens: np.ndarray
    counts: np.ndarray
    biases: np.ndarray


def _processor(metadata: SamplingMetadata, kind: type, attribute: str) -> dict:
    for processor in metadata.logitsprocs.non_argmax_invariant:
        if type(processor) is kind:
            return getattr(processor, attribute)
    return {}


def needs_output(metadata: SamplingMetadata) -> bool:
    return not metadata.no_penalties or bool(metadata.bad_words_token_ids)


def needed(metadata: SamplingMetadata) -> bool:
    """Whether any row of the batch has an edit or a ban."""
    return (
        needs_output(metadata)
        or bool(_processor(metadata, LogitBiasLogitsProcessor, "biases"))
        or bool(_processor(metadata, MinTokensLogitsProcessor, "min_toks"))
    )


def _known(output: Sequence[int]) -> int:
    """How many tokens of an output the host knows."""
    known = len(output)
    while known and output[known - 1] == PENDING:
        known -= 1
    return known


def _bad_word_bans(
    words: list[list[int]], output: list[int], known: int, pending: bool
) -> Iterator[tuple[int, int]]:
    """vLLM's apply_bad_words; the condition is on the token not known yet."""
    for word in words:
        *prefix, last = word
        if len(prefix) > known + pending:
            continue
        condition = prefix.pop() if pending and prefix else ALWAYS
        if prefix == output[known - len(prefix) : known]:
            yield last, condition


class Edits:
    """Packs the edits of a step.

    Args:
        vocab_size: the width of the logits.
        sizes: see SIZES.
    """

    def __init__(self, vocab_size: int, sizes: Sequence[tuple[int, int]] = SIZES):
        self._vocab = vocab_size
        self._sizes = sizes
        self._histories: dict[int, _History] = {}
        self._biases: dict[int, tuple[dict, np.ndarray, np.ndarray]] = {}

    def rounds(
        self,
        metadata: SamplingMetadata,
        rows: Sequence[int],
        num_rows: int,
        source_of: SourceOf,
        resolve: Callable[[], None],
        penalties: bool = True,
        biases_and_bans: bool = True,
    ) -> list[Round]:
        """The calls of `sampling.edit` that make the edits of some rows.

        Args:
            metadata: vLLM's.
            rows: which of its rows; the first becomes row 0 and so on.
            num_rows: how many rows the packed arrays are for.
            source_of: see SourceOf. May fetch the token instead, and return None.
            resolve: makes every output known.
            penalties: whether to make these.
            biases_and_bans: whether to make these.
        """
        edits = self._edits(
            metadata, rows, source_of, resolve, penalties, biases_and_bans
        )
        bans: list[Ban] = []
        sources = np.full(num_rows, -1, np.int32)
        for row in edits:
            sources[row.row] = row.source
        if biases_and_bans:
            bans = list(self._bans(metadata, rows, source_of, sources))
        return self._pack(edits, bans, sources, num_rows)

    def _edits(
        self,
        metadata: SamplingMetadata,
        rows: Sequence[int],
        source_of: SourceOf,
        resolve: Callable[[], None],
        penalties: bool,
        biases: bool,
    ) -> list[_Row]:
        with_penalties = penalties and not metadata.no_penalties
        kept: dict[int, _History] = {}
        bias_of = _processor(metadata, LogitBiasLogitsProcessor, "biases")
        kept_biases = {}
        if with_penalties:
            repetition = metadata.repetition_penalties.numpy()
            frequency = metadata.frequency_penalties.numpy()
            presence = metadata.presence_penalties.numpy()
            penalised = (repetition != 1) | (frequency != 0) | (presence != 0)
        edits = []
        for j, i in enumerate(rows):
            bias = bias_of.get(i) if biases else None
            if with_penalties and penalised[i]:
                factors = (repetition[i], frequency[i], presence[i])
                output = metadata.output_token_ids[i]
                source = _source(output, source_of)
                history = self._history(metadata, i, repetition[i] != 1)
                kept[id(output)] = history
                if source >= 0 and history.size + len(bias or ()) > self._sizes[-1][0]:
                    # A row of several rounds cannot tell whether its pending token
                    # is among the edits of another.
                    resolve()
                    source = -1
                    history.update(_known(output))
                tokens = history.tokens[: history.size]
                counts = history.counts[: history.size]
                floats = np.zeros(tokens.size, np.float32)
                if bias:
                    tokens, counts, floats = _with_bias(history, floats, bias)
                edits.append(_Row(j, factors, source, tokens, counts, floats))
            elif bias:
                if (cached := self._biases.get(id(bias))) is None:
                    tokens = np.fromiter(bias.keys(), np.int64, len(bias))
                    floats = np.fromiter(bias.values(), np.float32, len(bias))
                    cached = (bias, tokens.astype(np.int32), floats)
                kept_biases[id(bias)] = cached
                _, tokens, floats = cached
                counts = np.zeros(tokens.size, np.int32)
                edits.append(_Row(j, (1, 0, 0), -1, tokens, counts, floats))
        if with_penalties and len(rows) == len(metadata.output_token_ids):
            self._histories = kept
        else:
            self._histories.update(kept)
        self._biases = kept_biases
        return edits

    def _history(
        self, metadata: SamplingMetadata, i: int, with_prompt: bool
    ) -> _History:
        output = metadata.output_token_ids[i]
        known = _known(output)
        history = self._histories.get(id(output))
        if history is None or not history.follows(known):
            prompt = None
            if with_prompt:
                prompt = np.unique(metadata.prompt_token_ids[i].numpy())
                prompt = prompt[(prompt >= 0) & (prompt < self._vocab)]
            history = _History(output, prompt)
        history.update(known)
        return history

    def _bans(
        self,
        metadata: SamplingMetadata,
        rows: Sequence[int],
        source_of: SourceOf,
        sources: np.ndarray,
    ) -> Iterator[Ban]:
        min_tokens = _processor(metadata, MinTokensLogitsProcessor, "min_toks")
        words_of = metadata.bad_words_token_ids
        if not min_tokens and not words_of:
            return
        for j, i in enumerate(rows):
            if i in min_tokens:
                for token in min_tokens[i][2]:
                    yield j, token, ALWAYS
            if i in words_of:
                output = metadata.output_token_ids[i]
                sources[j] = _source(output, source_of)
                bans = _bad_word_bans(
                    words_of[i], output, _known(output), sources[j] >= 0
                )
                for token, condition in bans:
                    yield j, token, condition

    def _pack(
        self,
        edits: list[_Row],
        bans: list[Ban],
        sources: np.ndarray,
        num_rows: int,
    ) -> list[Round]:
        largest, most_bans = self._sizes[-1]
        groups: list[list[_Row]] = [[]]
        room = largest
        for row in edits:
            at = 0
            while True:
                if row.tokens.size - at > room and groups[-1]:
                    groups.append([])
                    room = largest
                end = min(at + room, row.tokens.size)
                part = slice(at, end)
                groups[-1].append(
                    row._replace(
                        tokens=row.tokens[part],
                        counts=row.counts[part],
                        biases=row.biases[part],
                    )
                )
                room -= end - at
                at = end
                if at == row.tokens.size:
                    break
        rounds = []
        while groups or bans:
            now, bans = bans[:most_bans], bans[most_bans:]
            group = groups.pop(0) if groups else []
            if group or now:
                rounds.append(self._round(group, now, sources, num_rows))
        return rounds

    def _round(
        self,
        group: list[_Row],
        bans: list[Ban],
        sources: np.ndarray,
        num_rows: int,
    ) -> Round:
        total = sum(row.tokens.size for row in group)
        num_edits, num_bans = next(
            (e, b) for e, b in self._sizes if total <= e and len(bans) <= b
        )
        packed = np.zeros(3 * num_edits + 2 * num_bans + 4 * num_rows, np.int32)
        cuts = np.cumsum([num_edits] * 3 + [num_bans] * 2 + [num_rows] * 4)[:-1]
        index, counts, bias, ban, condition, *factors, source = np.split(packed, cuts)
        factors = [x.view(np.float32) for x in factors]
        factors[0][:] = 1
        source[:] = sources
        bias = bias.view(np.float32)
        at = 0
        for row in group:
            end = at + row.tokens.size
            np.add(row.tokens, row.row * self._vocab, out=index[at:end])
            counts[at:end], bias[at:end] = row.counts, row.biases
            for x, factor in zip(factors, row.penalties, strict=True):
                x[row.row] = factor
            at = end
        # The rest are copies of the first edit. Where there is none they name token 0
        # of row 0, and change it only if it is pending, as it ought to be.
        if at:
            index[at:], counts[at:], bias[at:] = index[0], counts[0], bias[0]
        # No ban: one whose condition no token meets.
        condition[:] = self._vocab
        for k, (banned_in, token, what) in enumerate(bans):
            ban[k], condition[k] = banned_in * self._vocab + token, what
        return Round(num_edits, num_bans, packed)


def _source(output: list[int], source_of: SourceOf) -> int:
    if not output or output[-1] != PENDING:
        return -1
    source = source_of(output)
    return -1 if source is None else source


def _with_bias(
    history: _History, floats: np.ndarray, bias: dict[int, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edits of a history and of biases together: a token has one."""
    new = {}
    for token, value in bias.items():
        at = history.place.get(token)
        if at is None:
            new[token] = value
        else:
            floats[at] = value
    return (
        np.concatenate(
            [history.tokens[: history.size], np.fromiter(new, np.int32, len(new))]
        ),
        np.concatenate([history.counts[: history.size], np.zeros(len(new), np.int32)]),
        np.concatenate([floats, np.fromiter(new.values(), np.float32, len(new))]),
    )
