"""vLLM's sampler on the device.

    sampler = DeviceSampler(vocab_size, max_rows, device, make_program)
    for rows in row_buckets:
        sampler.warm_up(rows)
    sampled = sampler(logits, argmax, metadata, num_rows)
    return sampled.sampler_output()

A step runs a few programs in a row, those that its batch needs: masks, edits, the draw,
logprobs. Each takes one packed array, none waits for the host, and the tokens stay on
the device until somebody fetches them, with their logprobs in the same transfer.
`programs` lists every program there can be.

A request with a logits processor of the user's own needs the host. Its row is fetched
and sampled there by the same functions and the same uniform number; the other rows do
not notice, but for the wait.

Tested by tests/engine/test_sampler.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from ..programs.feed import FedStep
from . import bitmasks, sampling
from . import edits as edits_module
from .edits import PENDING, Edits
from .fed import FedCalls
from .sampled import SampledOnDevice

LOGPROBS_MODES = (
    "raw_logprobs",
    "raw_logits",
    "processed_logprobs",
    "processed_logits",
)
VARIANTS = ("plain", "topk", "search", "search2")
# How many of the likeliest tokens the usual program of logprobs reports: OpenAI's API
# allows 20.
NUM_LOGPROBS = 20
# How many rows the host takes from the device at a time.
HOST_ROWS = 8

_BUILTIN = (LogitBiasLogitsProcessor, MinPLogitsProcessor, MinTokensLogitsProcessor)
# What a program's function is made with: a variant, a count, a size of `edits`.
What = str | int | tuple[int, int] | None
# (function, rows, what)
Key = tuple[str, int, What]
Program = Callable[..., torch.Tensor | Sequence[torch.Tensor]]
MakeProgram = Callable[[str, Program], Program]


class DeviceSampler:
    """Samples a batch on the device.

    Args:
        vocab_size: the width of the logits.
        max_rows: of any step: the length of the vector of tokens.
        device: where the logits are.
        make_program: compiles a function of tensors, given its name.
        compile_calls: compiles programs for calls of them, before they are called.
        logprobs_mode: vLLM's.
        max_logprobs: vLLM's: how many a request may ask for, -1 for all.
        seed: of the requests without one of their own. Ranks that sample the same
            logits need the same.
        is_fed: whether the programs that `make_program` compiles read the host's
            arrays where it has written them, and not by transfers.

    Attributes:
        late_programs: the programs made since the last warm-up.
        host_rows: how many rows were sampled on the host.
        host_waits: how many times a step waited for the tokens of the one before.
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: torch.device | str,
        make_program: MakeProgram = lambda name, function: function,
        *,
        compile_calls: Callable[[list[tuple[Any, tuple]]], None] = lambda calls: None,
        logprobs_mode: str = "raw_logprobs",
        max_logprobs: int = NUM_LOGPROBS,
        seed: int = 0,
        is_fed: bool = False,
    ):
        if logprobs_mode not in LOGPROBS_MODES:
            raise ValueError(
                "DeviceSampler: logprobs_mode must be one of "
                f"{', '.join(LOGPROBS_MODES)}, got {logprobs_mode}"
            )
        if not 0 < vocab_size <= 1 << 24 or vocab_size * max_rows >= 1 << 31:
            raise ValueError(
                "DeviceSampler: vocab_size must be at most 2**24, and max_rows "
                f"times it less than 2**31, got {vocab_size} and {max_rows}"
            )
        self.vocab_size, self.max_rows, self.device = vocab_size, max_rows, device
        self._words = -(-vocab_size // 32)  # of a bitmask
        self.late_programs: list[Key] = []
        self.host_rows = self.host_waits = 0
        self._make_program, self._compile_calls = make_program, compile_calls
        self._programs: dict[Key, Program] = {}
        self._normalise = logprobs_mode.endswith("logprobs")
        self._processed = logprobs_mode.startswith("processed")
        self._num_logprobs = min(NUM_LOGPROBS, vocab_size)
        self._all_logprobs = not 0 <= max_logprobs <= self._num_logprobs
        self._feeds = self._make_feeds() if is_fed else {}
        self._random = np.random.default_rng(seed)
        self._edits = Edits(vocab_size)
        self._allowed: tuple[object, int, np.ndarray | None] = (None, 0, None)
        self._last: list[SampledOnDevice] = []
        with torch.inference_mode(False):
            self._no_tokens = torch.zeros(max_rows, dtype=torch.int32).to(device)

    # ---- Programs

    def programs(self, rows: int) -> list[Key]:
        """Every program that steps of this many (padded) rows may use."""
        keys: list[Key] = [("sample", rows, variant) for variant in VARIANTS]
        keys += [("edit", rows, size) for size in edits_module.SIZES]
        keys += [("mask", rows, None), ("logprobs", rows, self._num_logprobs)]
        if self._all_logprobs:
            keys.append(("logprobs", rows, -1))
        keys += [("take", rows, HOST_ROWS), ("merge", rows, None)]
        return keys

    def _function(self, key: Key) -> Program:
        match key:
            case "sample", rows, str(variant):
                padding = self.max_rows - rows

                def sample(
                    logits: torch.Tensor, params: torch.Tensor
                ) -> tuple[torch.Tensor, ...]:
                    tokens, *rest = sampling.sample(
                        logits, params, variant, self._processed
                    )
                    return torch.nn.functional.pad(tokens, (0, padding)), *rest

                return sample
            case "edit", _, (num_edits, num_bans):
                return functools.partial(
                    sampling.edit, num_edits=num_edits, num_bans=num_bans
                )
            case "mask", _, _:
                return sampling.mask
            case "logprobs", _, -1:
                return sampling.log_softmax
            case "logprobs", rows, int(n):
                return lambda logits, tokens: sampling.logprobs(
                    logits, tokens[:rows], n, self._normalise
                )
            case "take", _, _:
                return lambda logits, rows: logits[rows.long()]
            case "merge", _, _:
                return lambda tokens, own: torch.where(own >= 0, own, tokens)
        raise AssertionError(f"no program {key}")

    def _program(self, key: Key) -> Program:
        program = self._programs.get(key)
        if program is None:
            name, rows, what = key
            function = self._function(key)
            if (feed := self._feeds.get(name)) is not None:
                shape = self._array_of(key).shape
                function = feed.program(function, shape, sends=name == "sample")
            program = self._make_program(f"sampler_{name}_{rows}_{what}", function)
            self._programs[key] = program
            self.late_programs.append(key)
        return program

    def _call(self, key: Key, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        result = self._program(key)(*tensors)
        return (result,) if isinstance(result, torch.Tensor) else result

    def _run(
        self, name: str, rows: int, what: What, *tensors: torch.Tensor
    ) -> torch.Tensor:
        return self._call((name, rows, what), *tensors)[0]

    def _make_feeds(self) -> dict[str, FedCalls]:
        """Of the programs that take an array of the host's at every step."""
        rows = self.max_rows
        largest = max(
            self._array_of(key).size
            for key in self.programs(rows)
            if key[0] in ("edit", "mask")
        )
        edits = FedCalls(largest)
        samples = FedCalls(sampling.NUM_PARAMS * rows, rows)
        return {"sample": samples, "edit": edits, "mask": edits}

    def _array_of(self, key: Key) -> np.ndarray:
        """An array that changes nothing, of the shape that the program takes."""
        match key:
            case "sample", rows, _:
                return np.ones((sampling.NUM_PARAMS, rows), np.int32)
            case "edit", rows, (num_edits, num_bans):
                return np.zeros(3 * num_edits + 2 * num_bans + 4 * rows, np.int32)
            case _, rows, _:
                return np.full((rows, self._words), -1, np.int32)

    def _call_with(
        self, key: Key, logits: torch.Tensor, array: np.ndarray, *others: torch.Tensor
    ) -> tuple[Sequence[torch.Tensor], FedStep | None]:
        """Calls a program that takes an array; the step is None where it is sent."""
        if (feed := self._feeds.get(key[0])) is None:
            return self._call(key, logits, self._up(array), *others), None
        fed, results = feed(self._program(key), logits, array, *others)
        return results, fed

    def warm_up(self, rows: int, logits: torch.Tensor | None = None) -> None:
        """Makes and runs every program of `programs(rows)`.

        Args:
            rows: a bucket.
            logits: [rows, V] float32 on the device, to run them on; zeros if None.
        """
        with torch.inference_mode(False), torch.no_grad():
            if logits is None:
                logits = self._up(np.zeros((rows, self.vocab_size), np.float32))
            calls = {
                key: (self._program(key), self._arguments(key, logits))
                for key in self.programs(rows)
            }
            self._compile_calls(list(calls.values()))
            for key, (program, tensors) in calls.items():
                # Twice: XLA makes a CUDA graph of a program when it runs again.
                for _ in range(2):
                    if key[0] in self._feeds:
                        array, (_, _, *others) = self._array_of(key), tensors
                        self._call_with(key, logits, array, *others)
                    else:
                        program(*tensors)
        self.late_programs.clear()

    def _arguments(self, key: Key, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        match key:
            case ("sample" | "edit" | "mask") as name, _, _:
                feed = self._feeds.get(name)
                given = feed.number() if feed else self._up(self._array_of(key))
                return logits, given, *((self._no_tokens,) if name == "edit" else ())
            case "logprobs", _, -1:
                return (logits,)
            case "logprobs", _, _:
                return logits, self._no_tokens
            case "take", _, int(count):
                return logits, self._up(np.zeros(count, np.int32))
            case _:
                return self._no_tokens, self._up(np.full(self.max_rows, -1, np.int32))

    def _up(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    # ---- A step

    def accepts(self, metadata: SamplingMetadata, num_rows: int) -> list[int]:
        """The rows that the host samples: those of logits processors not vLLM's own."""
        rows: set[int] = set()
        for processor in metadata.logitsprocs.all:
            if type(processor) in _BUILTIN:
                continue
            if not isinstance(processor, AdapterLogitsProcessor):
                return list(range(num_rows))
            rows.update(processor.req_info)
        return sorted(row for row in rows if row < num_rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        logits: torch.Tensor,
        argmax: torch.Tensor | None,
        metadata: SamplingMetadata,
        num_rows: int,
        grammar_bitmask: np.ndarray | None = None,
        discard: Sequence[bool] | np.ndarray | None = None,
        fed: FedStep | None = None,
    ) -> SampledOnDevice:
        """Samples one token a row.

        Args:
            logits: [L, V] float32 on the device, L a bucket. They are not changed.
            argmax: [max_rows] int32 on the device, the first largest logit of each
                row, which spares a greedy batch without edits a program; or None.
            metadata: vLLM's; row i of it is row i of the logits.
            num_rows: how many rows there are.
            grammar_bitmask: [num_rows, words] int32, see `bitmasks.arrange`.
            discard: rows whose token is thrown away, a prompt's that goes on: they
                use up no random number.
            fed: the step, if it has sent `argmax` to the host.
        """
        rows = logits.shape[0]
        if not 0 < num_rows <= rows <= self.max_rows:
            raise ValueError(
                "DeviceSampler: num_rows must be between 1 and the rows of logits, "
                f"{rows}, at most {self.max_rows}, got {num_rows}"
            )
        discarded = np.zeros(num_rows, bool)
        if discard is not None:
            discarded[:] = np.asarray(discard[:num_rows], bool)
        own = self.accepts(metadata, num_rows)
        uniform = self._uniform(metadata, num_rows, discarded)
        fetched = logits
        if grammar_bitmask is not None:
            words = bitmasks.padded(grammar_bitmask, rows, self._words)
            logits = self._masked(logits, words)
        reported = logits
        allowed = self._allowed_bits(metadata, rows)
        if allowed is not None:
            logits = self._masked(logits, allowed)
        if edits_module.needed(metadata):
            prev = self._last[-1].tokens if self._last else self._no_tokens
            for step in self._edits.rounds(
                metadata, range(num_rows), rows, self._source_of, self._resolve
            ):
                edit: Key = ("edit", rows, (step.num_edits, step.num_bans))
                (logits, *_), _ = self._call_with(edit, logits, step.packed, prev)

        n = metadata.max_num_logprobs
        if (
            argmax is not None
            and metadata.all_greedy
            and logits is fetched
            and not (self._processed and n is not None)
        ):
            tokens = argmax
        else:
            params = self._params(metadata, num_rows, rows, uniform)
            variant = self._variant(params, num_rows)
            key = ("sample", rows, variant)
            (tokens, *rest), fed = self._call_with(key, logits, params)
            if self._processed:
                reported = rest[0]
        columns: torch.Tensor | None = None
        host_logprobs: dict[int, torch.Tensor] = {}
        if own:
            fed = None
            tokens, host_logprobs = self._sample_on_host(
                fetched, tokens, metadata, own, grammar_bitmask, uniform
            )
        if n is not None:
            columns = self._logprobs(reported, tokens, n)
        read = fed.result if fed is not None else None
        sampled = SampledOnDevice(tokens, num_rows, columns, n, read)
        sampled._host_logprobs = host_logprobs
        for row, output in enumerate(metadata.output_token_ids[:num_rows]):
            if not discarded[row]:
                sampled._outputs[id(output)] = (output, len(output), row)
        self._last = [*self._last[-1:], sampled]
        return sampled

    def _logprobs(
        self, reported: torch.Tensor, tokens: torch.Tensor, n: int
    ) -> torch.Tensor:
        rows = reported.shape[0]
        if 0 <= n <= self._num_logprobs:
            what = self._num_logprobs
            return self._run("logprobs", rows, what, reported, tokens)
        if n != -1:
            # Rare enough for the host; vLLM bounds n by max_logprobs.
            if self._normalise:
                reported = self._run("logprobs", rows, -1, reported)
            return sampling.logprobs(
                reported.cpu(), tokens.cpu()[:rows], n, normalise=False
            )
        return (
            self._run("logprobs", rows, -1, reported) if self._normalise else reported
        )

    def _masked(self, logits: torch.Tensor, words: np.ndarray) -> torch.Tensor:
        (masked, *_), _ = self._call_with(
            ("mask", logits.shape[0], None), logits, words
        )
        return masked

    def _source_of(self, output: list[int]) -> int | None:
        if len(output) > 1 and output[-2] == PENDING:
            self._resolve()
        row = self._last[-1].row_of(output) if self._last else None
        if output[-1] == PENDING and row is None:
            self._resolve()  # It was sampled before the last step.
        return row if output[-1] == PENDING else None

    def _resolve(self) -> None:
        """Makes every output known to the host: waits for the last steps."""
        self.host_waits += 1
        for sampled in self._last:
            sampled.fetch()

    # ---- What goes to the device

    def _allowed_bits(self, metadata: SamplingMetadata, rows: int) -> np.ndarray | None:
        forbidden = metadata.allowed_token_ids_mask
        if forbidden is None:
            return None
        # vLLM makes new metadata when the batch changes, and only then.
        if self._allowed[0] is not metadata or self._allowed[1] != rows:
            words = bitmasks.pack(~forbidden.numpy())
            words = bitmasks.padded(words, rows, self._words)
            self._allowed = (metadata, rows, words)
        return self._allowed[2]

    def _uniform(
        self, metadata: SamplingMetadata, num_rows: int, discarded: np.ndarray
    ) -> np.ndarray:
        """UNIFORM_BITS random bits a row, [num_rows] int64."""
        if metadata.all_greedy:
            return np.zeros(num_rows, np.int64)
        bound = 1 << sampling.UNIFORM_BITS
        uniform = self._random.integers(bound, size=num_rows)
        for row, generator in metadata.generators.items():
            if row < num_rows and not discarded[row]:
                uniform[row] = random_bits(generator)
        return uniform

    def _params(
        self, metadata: SamplingMetadata, num_rows: int, rows: int, uniform: np.ndarray
    ) -> np.ndarray:
        """The params of `sampling.sample`."""
        params = np.zeros((sampling.NUM_PARAMS, rows), np.int32)
        floats = params.view(np.float32)
        params[sampling.TOP_K] = self.vocab_size
        floats[sampling.TOP_P] = 1
        floats[sampling.LOG_MIN_P] = -np.inf
        now = slice(0, num_rows)
        if metadata.temperature is not None:
            floats[sampling.TEMPERATURE, now] = metadata.temperature.numpy()[now]
        if metadata.top_k is not None:
            params[sampling.TOP_K, now] = metadata.top_k.numpy()[now]
        if metadata.top_p is not None:
            floats[sampling.TOP_P, now] = metadata.top_p.numpy()[now]
        for processor in metadata.logitsprocs.argmax_invariant:
            if type(processor) is MinPLogitsProcessor and processor.min_p_count:
                with np.errstate(divide="ignore"):
                    min_p = np.log(processor.min_p_cpu[now])
                floats[sampling.LOG_MIN_P, now] = min_p
        high = sampling.UNIFORM_BITS // 2
        params[sampling.UNIFORM_HIGH, now] = uniform >> high
        params[sampling.UNIFORM_LOW, now] = uniform & ((1 << high) - 1)
        return params

    def _variant(self, params: np.ndarray, num_rows: int) -> str:
        """The cheapest program that serves all rows."""
        with_p = params.view(np.float32)[sampling.TOP_P, :num_rows] < 1
        top_k = params[sampling.TOP_K, :num_rows]
        with_k = top_k < self.vocab_size
        if not with_k.any() and not with_p.any():
            return "plain"
        if (with_k | ~with_p).all() and top_k[with_k].max() <= sampling.SMALL_K:
            return "topk"
        return "search2" if (with_k & with_p).any() else "search"

    # ---- The rows of the host

    def _sample_on_host(
        self,
        fetched: torch.Tensor,
        tokens: torch.Tensor,
        metadata: SamplingMetadata,
        own: list[int],
        bitmask: np.ndarray | None,
        uniform: np.ndarray,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The tokens with those of some rows sampled here, and their logprobs."""
        self._resolve()
        self.host_rows += len(own)
        rows = fetched.shape[0]
        parts = []
        for at in range(0, len(own), HOST_ROWS):
            part = own[at : at + HOST_ROWS]
            index = np.zeros(HOST_ROWS, np.int32)
            index[: len(part)] = part
            taken = self._run("take", rows, HOST_ROWS, fetched, self._up(index))
            parts.append(taken.cpu()[: len(part)])
        logits = torch.cat(parts)
        if bitmask is not None:
            words = bitmasks.padded(bitmask[own], len(own), self._words)
            logits = sampling.mask(logits, torch.from_numpy(words))
        reported = logits
        if (forbidden := metadata.allowed_token_ids_mask) is not None:
            logits = logits.masked_fill(forbidden[own], -torch.inf)
        logits = self._edit_on_host(logits, metadata, own, penalties=False)
        for processor in metadata.logitsprocs.non_argmax_invariant:
            logits = _applied(processor, logits, own)
        logits = self._edit_on_host(logits, metadata, own, penalties=True)

        of_all = self._params(metadata, uniform.size, rows, uniform)
        params = torch.from_numpy(of_all[:, own])
        floats = params.view(torch.float32)
        customs = [
            processor
            for processor in metadata.logitsprocs.argmax_invariant
            if type(processor) not in _BUILTIN
        ]
        greedy = sampling.sample(logits, params, "plain")[0]
        if customs:
            # They come after temperature and min-p.
            z = sampling.scaled(logits, floats[sampling.TEMPERATURE].unsqueeze(-1))
            least = z.amax(-1, keepdim=True) + floats[sampling.LOG_MIN_P].unsqueeze(-1)
            logits = z.masked_fill(z < least, -torch.inf)
            for processor in customs:
                logits = _applied(processor, logits, own)
            was_greedy = floats[sampling.TEMPERATURE] < sampling.GREEDY_BELOW
            floats[sampling.TEMPERATURE] = torch.where(was_greedy, 0.0, 1.0)
            floats[sampling.LOG_MIN_P] = -torch.inf
        chosen, processed = sampling.sample(logits, params, "search2", True)
        is_greedy = floats[sampling.TEMPERATURE] < sampling.GREEDY_BELOW
        chosen = torch.where(is_greedy, greedy, chosen)

        merged = np.full(self.max_rows, -1, np.int32)
        merged[own] = chosen.numpy()
        tokens = self._run("merge", rows, None, tokens, self._up(merged))
        n = metadata.max_num_logprobs
        logprobs: dict[int, torch.Tensor] = {}
        if n is not None:
            reported = processed if self._processed else reported
            if n == -1:
                log = sampling.log_softmax(reported) if self._normalise else reported
            else:
                most = max(n, self._num_logprobs)
                log = sampling.logprobs(reported, chosen, most, self._normalise)
            logprobs = dict(zip(own, log, strict=True))
        return tokens, logprobs

    def _edit_on_host(
        self,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        own: list[int],
        penalties: bool,
    ) -> torch.Tensor:
        for step in self._edits.rounds(
            metadata,
            own,
            len(own),
            self._source_of,
            self._resolve,
            penalties=penalties,
            biases_and_bans=not penalties,
        ):
            packed, none = torch.from_numpy(step.packed), self._no_tokens.cpu()
            logits = sampling.edit(logits, packed, none, step.num_edits, step.num_bans)
        return logits


def random_bits(generator: torch.Generator) -> int:
    """The next uniform number of a request with a seed, UNIFORM_BITS bits."""
    bound = 1 << sampling.UNIFORM_BITS
    return int(torch.randint(bound, (), dtype=torch.int64, generator=generator))


def _applied(
    processor: LogitsProcessor, logits: torch.Tensor, own: list[int]
) -> torch.Tensor:
    """What a processor of the user's makes of the rows `own` of a batch."""
    if type(processor) in _BUILTIN:
        return logits
    if not isinstance(processor, AdapterLogitsProcessor):
        return processor.apply(logits)  # of all rows: see DeviceSampler.accepts
    logits = logits.clone()
    for at, row in enumerate(own):
        if row in processor.req_info:
            logits[at] = processor.req_info[row](logits[at])
    return logits
