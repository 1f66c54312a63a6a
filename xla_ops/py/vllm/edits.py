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


def _penalised(metadata: SamplingMetadata) -> np.ndarray:
    """Which rows have a penalty."""
    of_repetition = metadata.repetition_penalties.numpy() != 1
    if metadata.no_penalties:
        return np.zeros_like(of_repetition)
    of_others = metadata.frequency_penalties.numpy() != 0
    return of_repetition | of_others | (metadata.presence_penalties.numpy() != 0)


def _known(output: Sequence[int]) -> int:
    """How many tokens of an output the host knows."""
    known = len(output)
    while known and output[known - 1] == PENDING:
        known -= 1
    return known


class _Look(NamedTuple):
    """What a step takes an output for, whatever another thread fetches meanwhile.

    Attributes:
        known: how many of its tokens count as known.
        source: the row of the last step that sampled the one after those, or -1.
    """

    known: int
    source: int


def _look(output: list[int], source_of: SourceOf) -> _Look:
    source = source_of(output) if output and output[-1] == PENDING else None
    if source is None:
        return _Look(_known(output), -1)
    return _Look(len(output) - 1, source)


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
        penalised = _penalised(metadata)
        # Once a row: what came of an output in between would be counted twice.
        looks = {
            i: _look(metadata.output_token_ids[i], source_of)
            for i in rows
            if penalised[i] or i in metadata.bad_words_token_ids
        }
        edits = self._edits(
            metadata,
            rows,
            looks,
            resolve,
            penalised if penalties else np.zeros_like(penalised),
            biases_and_bans,
        )
        bans = list(self._bans(metadata, rows, looks)) if biases_and_bans else []
        sources = np.full(num_rows, -1, np.int32)
        for j, i in enumerate(rows):
            if i in looks:
                sources[j] = looks[i].source
        return self._pack(edits, bans, sources, num_rows)

    def _edits(
        self,
        metadata: SamplingMetadata,
        rows: Sequence[int],
        looks: dict[int, _Look],
        resolve: Callable[[], None],
        penalised: np.ndarray,
        biases: bool,
    ) -> list[_Row]:
        with_penalties = bool(penalised.any())
        kept: dict[int, _History] = {}
        bias_of = _processor(metadata, LogitBiasLogitsProcessor, "biases")
        kept_biases = {}
        if with_penalties:
            repetition = metadata.repetition_penalties.numpy()
            frequency = metadata.frequency_penalties.numpy()
            presence = metadata.presence_penalties.numpy()
        edits = []
        for j, i in enumerate(rows):
            bias = bias_of.get(i) if biases else None
            if penalised[i]:
                factors = (repetition[i], frequency[i], presence[i])
                output = metadata.output_token_ids[i]
                with_prompt = repetition[i] != 1
                history = self._history(metadata, i, looks[i].known, with_prompt)
                kept[id(output)] = history
                most = self._sizes[-1][0]
                if looks[i].source >= 0 and history.size + len(bias or ()) > most:
                    # A row of several rounds cannot tell whether its pending token
                    # is among the edits of another.
                    resolve()
                    looks[i] = _Look(_known(output), -1)
                    history.update(looks[i].known)
                tokens = history.tokens[: history.size]
                counts = history.counts[: history.size]
                floats = np.zeros(tokens.size, np.float32)
                if bias:
                    tokens, counts, floats = _with_bias(history, floats, bias)
                edits.append(_Row(j, factors, tokens, counts, floats))
            elif bias:
                if (cached := self._biases.get(id(bias))) is None:
                    tokens = np.fromiter(bias.keys(), np.int64, len(bias))
                    floats = np.fromiter(bias.values(), np.float32, len(bias))
                    cached = (bias, tokens.astype(np.int32), floats)
                kept_biases[id(bias)] = cached
                _, tokens, floats = cached
                counts = np.zeros(tokens.size, np.int32)
                edits.append(_Row(j, (1, 0, 0), tokens, counts, floats))
        if with_penalties and len(rows) == len(metadata.output_token_ids):
            self._histories = kept
        else:
            self._histories.update(kept)
        self._biases = kept_biases
        return edits

    def _history(
        self, metadata: SamplingMetadata, i: int, known: int, with_prompt: bool
    ) -> _History:
        output = metadata.output_token_ids[i]
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
        looks: dict[int, _Look],
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
                output, look = metadata.output_token_ids[i], looks[i]
                bans = _bad_word_bans(words_of[i], output, look.known, look.source >= 0)
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
