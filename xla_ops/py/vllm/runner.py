"""vLLM's model runner with the model on XLA.

Scheduling, batches, block tables and everything else of a dynamic shape is vLLM's own,
on the host (host.py). A step of n tokens goes to the device as one vector (step.py), to
the program of the smallest bucket that holds n; programs are traced at warm-up and
replayed (programs/replay.py). Caches, hidden states, logits and sampled tokens stay on
the device; under async scheduling the next step's tokens too.

Tested by tests/engine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from tqdm import tqdm
from vllm.config import VllmConfig
from vllm.forward_context import override_forward_context
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    LogitsProcessors,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import bind_kv_cache

from ..programs.feed import FedStep, HostFeed
from ..programs.replay import compile_calls, replay
from . import bitmasks, communicator, host, loading, tuning
from .attention import XlaAttentionBackend, XlaMetadata, attention_of
from .fed import FEED_SLOTS
from .platform import is_gpu
from .rejection import DeviceRejectionSampler
from .results import PromptRows, StepResult
from .sampled import SampledOnDevice
from .sampler import DeviceSampler
from .step import Layout, Step, buckets

logger = init_logger("vllm.xla_ops")

# Rows of a program of logits for prompt logprobs.
_PROMPT_ROWS = 64
_SMALLEST_BUCKET = 8


class XlaModelRunner(GPUModelRunner):
    """See the module's text."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        with host.without_cuda():
            super().__init__(vllm_config, torch.device("cpu"))
        self.xla_device = device
        self.broadcast_pp_output = False  # there is one stage, and it has the logits
        self.cascade_attn_enabled = False
        host.join_buffers(self, self.input_batch)
        self._buckets = buckets(
            min(_SMALLEST_BUCKET, self.max_num_tokens), self.max_num_tokens
        )
        # Few, since each has a program of every way to sample; more rows than are
        # needed cost little, since weights are read once, but logits are written.
        self._row_buckets = [
            size
            for size in buckets(self._buckets[0], self._most_logit_rows)
            if size in (self._most_logit_rows, 8, 32, 64, 128, 512)
        ]
        self._max_logit_rows = self._row_buckets[-1]
        self._bitmask: np.ndarray | None = None
        self._sources: np.ndarray | None = None
        self._previous: torch.Tensor | None = None
        self._adapter_slots: np.ndarray | None = None

    # What vLLM's runner asks CUDA.

    def _init_device_properties(self) -> None:
        pass

    def _sync_device(self) -> None:
        pass

    def _to_list(self, sampled_token_ids: torch.Tensor) -> list[list[int]]:
        return sampled_token_ids.tolist()

    def may_reinitialize_input_batch(self, *args: Any, **kwargs: Any) -> None:
        super().may_reinitialize_input_batch(*args, **kwargs)
        if self.speculative_config is not None:
            # vLLM leaves them out; its warning that they do not work is not so here.
            self.input_batch.logitsprocs = LogitsProcessors(
                kind(self.vllm_config, self.device, False)
                for kind in BUILTIN_LOGITS_PROCESSORS
            )
        host.join_buffers(self, self.input_batch)

    # The model.

    def load_model(self, eep_scale_up: bool = False) -> None:
        start = time.perf_counter()
        load = self.vllm_config.load_config
        dummy = load.load_format == "dummy" and loading.can_be_dummy(
            self.vllm_config.quant_config
        )
        if dummy:
            load.load_format = loading.DUMMY_FORMAT
        super().load_model(eep_scale_up)
        self.model_memory_usage = loading.move(self.model, self.xla_device, dummy=dummy)
        self._adapters = None
        if self.lora_config is not None:
            self._adapters = self.lora_manager._adapter_manager
            self._adapters.place(self.xla_device)
            self.model_memory_usage += self._adapters.slots.num_bytes
        self._logits_of: Callable = self.model.compute_logits
        self.model.compute_logits = self._compute_logits
        self.model.load_weights = loading.reloading(
            self.model.load_weights, self.vllm_config
        )
        self._prompt_logits = replay(
            self._logits_of_prompt, state=(self.model, *self._adapter_buffers)
        )
        self._sampler = DeviceSampler(
            self.input_batch.vocab_size,
            self._max_logit_rows,
            self.xla_device,
            lambda name, function: replay(function),
            compile_calls=compile_calls,
            logprobs_mode=self.model_config.logprobs_mode,
            max_logprobs=self.model_config.max_logprobs,
            seed=self.model_config.seed or 0,
            is_fed=True,
        )
        self._rejection_sampler = DeviceRejectionSampler(self._sampler)
        logger.info(
            "Model on the device: %.2f GiB after %.1f s",
            self.model_memory_usage / 2**30,
            time.perf_counter() - start,
        )

    @property
    def _adapter_buffers(self) -> list[torch.Tensor]:
        return [] if self._adapters is None else self._adapters.slots.buffers

    def _adapters_of(self, slots: torch.Tensor | None) -> Any:
        """While a program is traced: rows have the adapters of these slots."""
        if self._adapters is None:
            return contextlib.nullcontext()
        return self._adapters.punica_wrapper.rows_of(slots)

    def _step(
        self,
        number: torch.Tensor,
        previous: torch.Tensor,
        layout: Layout,
        groups: Mapping[str, int],
    ) -> tuple[torch.Tensor, ...]:
        """The program of a step.

        Args:
            number: the step's in the feed, from where its vector is taken.
            previous: [max_logit_rows] int32, the tokens sampled last.
            layout: of the vector.
            groups: of each attention layer the KV group.

        Returns:
            The next step's number, greedy tokens, logits, hidden states.
        """
        vector, following = self._feed.receive(number, layout.size)
        step = layout.unpack(vector)
        sources = step["sources"]
        sampled = previous[sources.clamp(min=0).to(torch.int64)]
        token_ids = torch.where(sources >= 0, sampled, step["token_ids"])
        metadata = [
            XlaMetadata(
                step[f"slots_{group}"].to(torch.int64),
                step["context_lens"],
                step[f"block_tables_{group}"],
                step["query_start_loc"],
                step["num_seqs"],
            )
            for group in range(len(layout.blocks))
        ]
        positions = step["positions"].to(torch.int64)
        adapter_slots = step.get("adapter_slots")
        indices = step["logit_indices"].to(torch.int64)
        with communicator.in_order():
            with (
                attention_of(
                    {name: metadata[group] for name, group in groups.items()},
                    self.compilation_config.static_forward_context,
                ),
                self._adapters_of(adapter_slots),
            ):
                hidden = self.model(
                    input_ids=token_ids,
                    positions=positions[0] if layout.position_rows == 1 else positions,
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )
            if adapter_slots is not None:
                adapter_slots = adapter_slots[indices]
            with self._adapters_of(adapter_slots):
                logits = self._logits_of(hidden[indices]).float()
        greedy = self._pad(logits.argmax(-1).to(torch.int32))
        return following, self._feed.send(greedy, number), logits, hidden

    def _pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """Every program's tokens are [max_logit_rows], so that any may follow any."""
        padding = self._max_logit_rows - tokens.shape[0]
        return torch.nn.functional.pad(tokens, (0, padding))

    def _logits_of_prompt(
        self, rows: torch.Tensor, slots: torch.Tensor | None
    ) -> torch.Tensor:
        """The program of a prompt's rows."""
        with communicator.in_order(), self._adapters_of(slots):
            return self._logits_of(rows).float()

    def _compute_logits(
        self, rows: StepResult | PromptRows
    ) -> StepResult | torch.Tensor:
        """model.compute_logits for vLLM's runner: of a step, or of a prompt's rows."""
        if isinstance(rows, StepResult):
            return rows
        parts = []
        for start in range(0, rows.hidden.shape[0], _PROMPT_ROWS):
            some = slice(start, start + _PROMPT_ROWS)
            hidden, slots = rows.hidden[some], rows.adapter_slots
            logits = self._run_prompt(hidden, None if slots is None else slots[some])
            parts.append(logits.cpu()[: hidden.shape[0]])
        return torch.cat(parts)

    def _get_nans_in_logits(
        self, logits: StepResult | torch.Tensor | None
    ) -> dict[str, int]:
        if isinstance(logits, StepResult):
            with torch.inference_mode(False):
                logits = logits.logits.cpu()[: logits.num_rows]
        counts: dict[str, int] = super()._get_nans_in_logits(logits)
        return counts

    def _run_prompt(
        self, hidden: torch.Tensor, adapter_slots: np.ndarray | None
    ) -> torch.Tensor:
        """Logits of at most _PROMPT_ROWS rows on the host, padded to as many."""
        padding = (0, 0, 0, _PROMPT_ROWS - hidden.shape[0])
        slots = None
        with torch.inference_mode(False), torch.no_grad():
            if self._adapters is not None:
                slots = torch.full((_PROMPT_ROWS,), -1, dtype=torch.int32)
                if adapter_slots is not None:
                    slots[: len(adapter_slots)] = torch.from_numpy(adapter_slots)
                slots = slots.to(self.xla_device)
            padded = torch.nn.functional.pad(hidden, padding)
            return self._prompt_logits(padded.to(self.xla_device), slots)

    # Caches.

    def initialize_kv_cache_tensors(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int]
    ) -> dict[str, torch.Tensor]:
        """Makes a cache for each of vLLM's KV cache tensors, which layers may share."""
        specs = {
            name: group.kv_cache_spec
            for group in self._kv_cache_spec_attn_group_iterator()
            for name in group.layer_names
            if name not in self.runner_only_attn_layers
        }
        caches: dict[str, torch.Tensor] = {}
        for tensor in kv_cache_config.kv_cache_tensors:
            shapes = {
                name: _cache_shape(specs[name], tensor.size)
                for name in tensor.shared_by
            }
            if len(set(shapes.values())) != 1:
                raise NotImplementedError(
                    "xla_ops: layers that share a KV cache must have one shape, got"
                    f" {shapes}: use disable_hybrid_kv_cache_manager=True"
                )
            shape, dtype = next(iter(shapes.values()))
            cache = torch.zeros(shape, dtype=dtype, device=self.xla_device)
            caches.update(dict.fromkeys(tensor.shared_by, cache))
        torch_xla.sync(wait=True)
        for name, target in self.shared_kv_cache_layers.items():
            caches[name] = caches[target]
        bind_kv_cache(
            caches, self.compilation_config.static_forward_context, self.kv_caches, 1
        )
        self._groups = {
            name: i
            for i, group in enumerate(kv_cache_config.kv_cache_groups)
            for name in group.layer_names
        }
        self._blocks = tuple(
            table.max_num_blocks_per_req
            for table in self.input_batch.block_table.block_tables
        )
        self._make_step_program(caches)
        return caches

    def _make_step_program(self, caches: Mapping[str, torch.Tensor]) -> None:
        self._layouts: dict[tuple[int, bool], Layout] = {}
        unique = {id(cache): cache for cache in caches.values()}
        self.caches = list(unique.values())
        largest = self._layout(self.max_num_tokens, self._adapters is not None).size
        feed = vars(self).get("_feed")
        if feed is None or feed.in_elements < largest:
            self._feed = HostFeed(largest, self._max_logit_rows, FEED_SLOTS)
        self._run_step = replay(
            lambda number, previous, layout: self._step(
                number, previous, layout, self._groups
            ),
            state=(self.model, *self.caches, *self._adapter_buffers),
            compile_options=lambda number, previous, layout: tuning.compile_options(
                layout.tokens, is_quantised=self.vllm_config.quant_config is not None
            ),
        )
        with torch.inference_mode(False):
            self._no_previous = torch.zeros(self._max_logit_rows, dtype=torch.int32).to(
                self.xla_device
            )

    def profile_run(self) -> None:
        """Runs the largest step with the smallest caches, for its peak of memory."""
        layers = self.compilation_config.static_forward_context
        specs = self.get_kv_cache_spec()
        with torch.inference_mode(False), torch.no_grad():
            caches = {}
            for name, spec in specs.items():
                shape, dtype = _cache_shape(spec, 2 * spec.page_size_bytes)
                caches[name] = torch.zeros(shape, dtype=dtype, device=self.xla_device)
            torch_xla.sync(wait=True)
            for name, target in self.shared_kv_cache_layers.items():
                caches[name] = caches[target]
            for name, cache in caches.items():
                layers[name].kv_cache = [cache]
            self._groups = dict.fromkeys(caches, 0)
            block_size = min(spec.block_size for spec in specs.values())
            self._blocks = (-(-self.max_model_len // block_size),)
            self._make_step_program(caches)
            step = Step.empty(1, self._position_rows)
            has_adapters = self._adapters is not None
            _, _, logits, _ = self._run(step, self.max_num_tokens, has_adapters)
            self._sampler.warm_up(logits.shape[0], logits)
            torch_xla._XLAC._xla_wait_device_ops([])
            for name in caches:
                layers[name].kv_cache = []
            del self._run_step, self.caches

    # Steps.

    @property
    def _position_rows(self) -> int:
        return 3 if self.uses_mrope else 1

    @property
    def _most_logit_rows(self) -> int:
        return min(self.max_num_tokens, self.max_num_reqs * (1 + self.num_spec_tokens))

    def _logit_rows(self, tokens: int) -> int:
        needed = min(tokens, self._most_logit_rows)
        return next(size for size in self._row_buckets if size >= needed)

    def _layout(self, tokens: int, has_adapters: bool) -> Layout:
        layout = self._layouts.get((tokens, has_adapters))
        if layout is None:
            layout = self._layouts[tokens, has_adapters] = Layout(
                tokens,
                min(tokens, self.max_num_reqs),
                self._logit_rows(tokens),
                self._blocks,
                self._position_rows,
                has_adapters,
            )
        return layout

    def _run(
        self,
        step: Step,
        tokens: int,
        has_adapters: bool,
        previous: torch.Tensor | None = None,
    ) -> tuple[FedStep, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Launches a step: itself, its greedy tokens, logits and hidden states."""
        layout = self._layout(tokens, has_adapters)
        layout.pack(step, self._feed.begin(layout.size))
        if previous is None:
            previous = self._no_previous
        if not is_gpu():
            # The client runs one program at a time, and torch_xla waits for it with
            # Python's lock held: nobody could read the last step's tokens.
            xm.wait_device_ops()
        following, *results = self._run_step(self._feed.number(), previous, layout)
        return self._feed.end(following), *results

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> tuple:
        prepared = super()._prepare_inputs(*args, **kwargs)
        self._logit_indices = prepared[0]
        return prepared

    @property
    def _kinds(self) -> list[bool]:
        """Of programs: whether a step's tokens may have adapters."""
        if self._adapters is None:
            return [False]
        # vLLM's switch, for its CUDA graphs: twice the programs, and steps without an
        # adapter cost what they cost without LoRA.
        both = self.compilation_config.cudagraph_specialize_lora
        return [False, True] if both else [True]

    def _set_active_loras(
        self,
        prompt_lora_mapping: tuple[int, ...],
        token_lora_mapping: tuple[int, ...],
        lora_requests: set[LoRARequest],
    ) -> None:
        """Puts a step's adapters into slots, and notes the slot of each token."""
        # The set lacks one of two adapters that have a name in common, as while one
        # that requests still run with is loaded anew.
        by_number = self.input_batch.lora_id_to_lora_request
        self.lora_manager.set_active_adapters([*by_number.values()], None)
        assert self._adapters is not None
        slots = self._adapters.slots_of(token_lora_mapping)
        self._adapter_slots = slots if (slots >= 0).any() else None

    def _prepare_input_ids(
        self, scheduler_output: Any, total: int, cu_num_tokens: np.ndarray
    ) -> None:
        """Notes which tokens of this step are those that the last step has sampled."""
        self._sources = self._previous = None
        sampled = self.input_batch.prev_sampled_token_ids
        if sampled is None:
            return
        rows = self.input_batch.prev_req_id_to_index
        self._sources = np.full(total, -1, np.int32)
        for request, i in self.input_batch.req_id_to_index.items():
            if (row := rows.get(request)) is not None:
                self._sources[cu_num_tokens[i] - 1] = row
        assert isinstance(sampled, SampledOnDevice)
        self._previous = sampled.tokens

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> StepResult:
        assert input_ids is not None and positions is not None
        n, r = input_ids.shape[0], self.input_batch.num_reqs
        groups = [
            (table.slot_mapping.np[:n], table.block_table.np[:r])
            for table in self.input_batch.block_table.block_tables
        ]
        step = Step(
            input_ids.numpy(),
            positions.numpy(),
            self._sources,
            self.query_start_loc.np[: r + 1],
            self.seq_lens.np[:r],
            self._logit_indices.numpy(),
            groups,
            self._adapter_slots,
        )
        bucket = next(size for size in self._buckets if size >= n)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            override_forward_context(None),
        ):
            has_adapters = step.adapter_slots is not None or self._kinds[0]
            fed, greedy, logits, hidden = self._run(
                step, bucket, has_adapters, self._previous
            )
        return StepResult(
            hidden, logits, greedy, fed, n, self._logit_indices, step.adapter_slots
        )

    # Sampling.

    def sample_tokens(self, grammar_output: Any) -> Any:
        state = self.execute_model_state
        self._bitmask = None
        if state is not None and grammar_output is not None:
            drafts = {
                request: len(tokens)
                for request, tokens in (
                    state.scheduler_output.scheduled_spec_decode_tokens.items()
                )
            }
            counts = [
                1 + drafts.get(request, 0) for request in self.input_batch.req_ids
            ]
            first = np.cumsum([0, *counts])
            self._bitmask = bitmasks.arrange(
                grammar_output.grammar_bitmask,
                grammar_output.structured_output_request_ids,
                dict(zip(self.input_batch.req_ids, first.tolist(), strict=False)),
                state.logits.num_rows,
                drafts,
            )
        # The mask is the sampler's: vLLM would apply it to logits on the host.
        return super().sample_tokens(None)

    def _sample(
        self, logits: StepResult, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        metadata = self.input_batch.sampling_metadata
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs]
        if spec_decode_metadata is None:
            sampled = self._sampler(
                logits.logits,
                logits.greedy,
                metadata,
                logits.num_rows,
                self._bitmask,
                discarded,
                logits.fed,
            )
            return sampled.sampler_output()
        return self._rejection_sampler(
            spec_decode_metadata,
            None,
            logits.logits,
            metadata,
            logits.greedy,
            self._bitmask,
            discarded,
            logits.fed,
        )

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> tuple:
        # vLLM would turn a generator back, by an offset that those on the host lack.
        # The sampler has drawn nothing for requests part way through their prompts.
        with mock.patch.object(self.input_batch, "generators", {}):
            return super()._bookkeeping_sync(*args, **kwargs)

    # Warm-up.

    def warm_up(self) -> None:
        """Compiles every program that a step may need, and runs it."""
        start = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            step = Step.empty(len(self._blocks), self._position_rows)
            steps = [(n, kind) for n in self._buckets for kind in self._kinds]
            total = len(steps) + len(self._row_buckets) + 1
            bar = tqdm(total=total, desc="Compiling programs", disable=None)
            given = self._feed.number(), self._no_previous
            compile_calls(
                [(self._run_step, (*given, self._layout(*kind))) for kind in steps],
                bar.update,
            )
            warmed = set()
            for tokens, has_adapters in steps:
                _, _, logits, hidden = self._run(step, tokens, has_adapters)
                if logits.shape[0] not in warmed:
                    warmed.add(logits.shape[0])
                    self._sampler.warm_up(logits.shape[0], logits)
                    bar.update()
            # The next needs nothing of those before, and could overtake them on one
            # worker and not on another.
            torch_xla._XLAC._xla_wait_device_ops([])
            rows = torch.zeros(_PROMPT_ROWS, hidden.shape[1], dtype=hidden.dtype)
            self._run_prompt(rows, None)
            bar.close()
            torch_xla._XLAC._xla_wait_device_ops([])
        logger.info(
            "Compiled %d programs of steps, and those of the sampler, in %.1f s",
            self._run_step.num_programs + self._prompt_logits.num_programs,
            time.perf_counter() - start,
        )


def _cache_shape(spec: KVCacheSpec, size: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a cache of `size` bytes."""
    shape = XlaAttentionBackend.get_kv_cache_shape(
        size // spec.page_size_bytes,
        spec.block_size,
        spec.num_kv_heads,
        spec.head_size,
    )
    return shape, spec.dtype
