"""LoRA: each request answers as the checkpoint with its adapter merged into it."""

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch_xla
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

import vllm_session
from vllm_adapters import ANSWER, LORA, answers, assert_answers
from vllm_checkpoints import LINEAR, OTHER, PROMPT, merge_lora, save_lora
from vllm_in_process import OPTIONS, core, engine, metric, steady
from vllm_oracle import Oracle, worst_difference
from vllm_session import FOLDER, MODES
from xla_ops.vllm import preload
from xla_ops.vllm.lora import Groups, add_products

LONG = (PROMPT + OTHER) * 3
# The adapters: what sets each apart. No adapter is number 0.
ADAPTERS = {
    1: dict(rank=8),
    2: dict(rank=4, targets=("q_proj", "v_proj", "up_proj")),
    3: dict(rank=8, targets=(*LINEAR, "embed_tokens", "lm_head")),
    4: dict(rank=1, targets=("down_proj",)),
}


@pytest.fixture(scope="module")
def checkpoint():
    return vllm_session.checkpoint("llama")


@pytest.fixture(scope="module")
def adapters(checkpoint):
    return {
        i: save_lora(checkpoint, FOLDER / f"adapter{i}", seed=i, **kind)
        for i, kind in ADAPTERS.items()
    }


@pytest.fixture(scope="module")
def oracles(checkpoint, adapters):
    merged = {
        i: Oracle(merge_lora(checkpoint, adapter, FOLDER / f"merged{i}"))
        for i, adapter in adapters.items()
    }
    return {0: vllm_session.oracle(checkpoint), **merged}


@pytest.fixture(scope="module")
def asked(adapters):
    """What a request says: by the adapter's number."""
    requests = {i: LoRARequest(f"a{i}", i, str(path)) for i, path in adapters.items()}
    return {0: None, **requests}


@pytest.fixture(scope="module", params=MODES)
def running(request, checkpoint):
    with engine(checkpoint, **MODES[request.param], **LORA) as llm:
        yield llm


@pytest.fixture
def llm(running):
    with steady(running):
        yield running


def runner(llm):
    return core(llm).model_executor.driver_worker.worker.model_runner


def test_adapters_change_answers(oracles):
    greedy_answers = [oracle.greedy(PROMPT, ANSWER) for oracle in oracles.values()]
    assert len({tuple(answer) for answer in greedy_answers}) == len(oracles)


def buffers(llm) -> list[int]:
    """Where the adapters' matrices lie."""
    torch_xla._XLAC._xla_wait_device_ops([])
    held = runner(llm)._adapters.slots.buffers
    return [torch_xla._XLAC._unsafe_buffer_pointer(tensor) for tensor in held]


@pytest.mark.parametrize("number", [0, *ADAPTERS])
def test_alone(llm, asked, oracles, number):
    assert_answers(llm, asked, oracles, [number], [PROMPT])


def test_adapters_of_one_name(llm, adapters, oracles):
    """One is loaded anew while the other runs; neither takes the other's prefixes."""
    same = {i: LoRARequest("same", 10 + i, str(adapters[i])) for i in (1, 2)}
    assert_answers(llm, same, oracles, [1, 2], [PROMPT, LONG])
    assert_answers(llm, same, oracles, [2, 1], [LONG])


@pytest.fixture
def steps(llm, monkeypatch):
    """The adapters of each step's tokens."""
    seen = []
    set_active = runner(llm)._set_active_loras

    def note(prompts, step_tokens, requests):
        seen.append(set(step_tokens))
        set_active(prompts, step_tokens, requests)

    monkeypatch.setattr(runner(llm), "_set_active_loras", note)
    return seen


def test_a_batch_of_several(llm, asked, oracles, steps):
    assert_answers(llm, asked, oracles, [0, 1, 2, 0])
    assert {0, 1, 2} in steps


def test_more_adapters_than_slots(llm, asked, oracles, steps):
    """They take turns; the matrices' buffers stay where they are."""
    before = buffers(llm)
    assert_answers(llm, asked, oracles, [1, 2, 3, 4, 0])
    assert buffers(llm) == before
    assert set().union(*steps) == {0, 1, 2, 3, 4}
    assert max(len(step - {0}) for step in steps) == 2


def test_prompts_in_chunks(llm, asked, oracles):
    assert len(LONG) > 2 * OPTIONS["max_num_batched_tokens"]
    assert_answers(llm, asked, oracles, [3, 1], [LONG, PROMPT])


@pytest.mark.parametrize("number", [0, 3])
def test_prompt_logprobs(llm, asked, oracles, number):
    """Of an adapter of the output layer, and beside one."""
    outputs = answers(llm, [LONG, PROMPT], [asked[number], asked[3]], prompt_logprobs=1)
    entries = outputs[0].prompt_logprobs[1:]
    oracle = oracles[number]
    assert worst_difference(oracle, LONG[:1], LONG[1:], entries) < 2e-4


def test_prefix_caching_is_by_adapter(llm, asked, oracles):
    start = [(13 * i + 1) % 256 + 64 for i in range(96)]
    for number, hit in [(0, False), (1, False), (1, True), (2, False), (0, True)]:
        before = metric(llm, "prefix_cache_hits")
        assert_answers(llm, asked, oracles, [number], [start + PROMPT])
        assert (metric(llm, "prefix_cache_hits") - before >= 80) == hit


def test_add_list_remove(llm, asked, oracles):
    for number in llm.llm_engine.list_loras():
        assert llm.llm_engine.remove_lora(number)
    assert llm.llm_engine.add_lora(asked[1])
    assert llm.llm_engine.list_loras() == {1}
    assert_answers(llm, asked, oracles, [1])
    assert llm.llm_engine.remove_lora(1)
    assert not llm.llm_engine.remove_lora(1)
    assert llm.llm_engine.list_loras() == set()
    assert_answers(llm, asked, oracles, [1])


def test_an_adapter_that_comes_back_to_another_slot(llm, asked, oracles):
    """Between two steps that look alike."""
    for number in llm.llm_engine.list_loras():
        llm.llm_engine.remove_lora(number)
    prompt = [PROMPT[:1]]
    assert_answers(llm, asked, oracles, [1], prompt)
    llm.llm_engine.remove_lora(1)
    llm.llm_engine.add_lora(asked[2])
    llm.llm_engine.add_lora(asked[1])
    assert runner(llm)._adapters.lora_index_to_id == [2, 1]
    assert_answers(llm, asked, oracles, [1], prompt)


def test_pin(llm, asked, oracles):
    """A pinned adapter stays, unless a step needs its place."""
    for number in llm.llm_engine.list_loras():
        llm.llm_engine.remove_lora(number)
    llm.llm_engine.add_lora(asked[1])
    assert llm.llm_engine.pin_lora(1)
    with pytest.raises(Exception, match="LoRA 2 is not registered"):
        llm.llm_engine.pin_lora(2)
    for number in (2, 3, 4):
        assert_answers(llm, asked, oracles, [number])
        assert llm.llm_engine.list_loras() == {1, number}
    assert_answers(llm, asked, oracles, [2, 3])
    assert llm.llm_engine.list_loras() == {2, 3}
    assert_answers(llm, asked, oracles, [1, 2, 0])


def changed(adapter: Path, folder: Path, change) -> Path:
    """A copy of an adapter whose config and tensors `change` has changed."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    matrices = load_file(adapter / "adapter_model.safetensors")
    change(config, matrices)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(matrices, folder / "adapter_model.safetensors")
    return folder


def _rename(matrices, old, new):
    for name in list(matrices):
        matrices[name.replace(old, new)] = matrices.pop(name)


def _narrow(matrices):
    name = next(n for n in matrices if "lora_A" in n)
    matrices[name] = matrices[name][:, :-16].clone()


BAD = {
    "rank": (lambda c, m: c.update(r=16), "greater than max_lora_rank"),
    "dora": (lambda c, m: c.update(use_dora=True), "DoRA"),
    "module": (
        lambda c, m: _rename(m, "q_proj", "other_proj"),
        "expected target modules",
    ),
    "layer": (
        lambda c, m: _rename(m, "layers.1.", "layers.7."),
        "must be the model's, got model.layers.7",
    ),
    "shape": (
        lambda c, m: _narrow(m),
        r"must have A of shape \[8, 256\] .*, got \(8, 240\)",
    ),
    "half": (
        lambda c, m: m.pop(next(n for n in m if "lora_B" in n)),
        "got .* and None in",
    ),
    "empty": (lambda c, m: m.clear(), "must have matrices, got none"),
}


@pytest.mark.parametrize("case", [*BAD, "folder"])
def test_bad_adapters(llm, asked, oracles, adapters, tmp_path, case):
    """An error for the one who asks, and nobody else notices."""
    if case == "folder":
        path, message = tmp_path / "nothing", "No adapter found for"
    else:
        change, message = BAD[case]
        path = changed(adapters[1], tmp_path / "bad", change)
    bad = LoRARequest("bad", 9, str(path))
    with pytest.raises(ValueError, match=message):
        answers(llm, [OTHER, PROMPT], [asked[2], bad])
    with pytest.raises(ValueError, match=message):
        llm.llm_engine.add_lora(bad)
    assert not llm.llm_engine.has_unfinished_requests()
    assert 9 not in llm.llm_engine.list_loras()
    assert_answers(llm, asked, oracles, [0, 1, 2])


class _Unable:
    """An engine in another process that cannot load an adapter."""

    async def add_lora_async(self, request):
        raise Exception("Call to add_lora method failed: no such thing")


def test_bad_adapters_of_an_asynchronous_client(asked):
    preload.install()
    client = SimpleNamespace(
        vllm_config=SimpleNamespace(lora_config=object()), engine_core=_Unable()
    )
    with pytest.raises(ValueError, match=r"LoRA a1 \(.*\): .* no such thing"):
        asyncio.run(
            AsyncLLM.add_request(client, "1", "text", None, lora_request=asked[1])
        )


# --- The products -------------------------------------------------------------


def test_rows_see_no_adapter_but_their_own():
    """Those without one are what they were, bit by bit, beside a broken adapter."""
    torch.manual_seed(0)
    slots = torch.tensor([2, -1, 0, 2, -1, 0, 0, -1], dtype=torch.int32)
    x, y = torch.randn(8, 16), torch.randn(8, 14)
    a, b, c = torch.randn(4, 8, 16), torch.randn(4, 5, 4), torch.randn(4, 7, 4)
    for broken in (a, b, c):
        broken[1] = math.nan
        broken[3] = math.inf
    wanted = y.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[row, :5] += b[slot] @ (a[slot, :4] @ x[row])
            wanted[row, 5:12] += c[slot] @ (a[slot, 4:] @ x[row])
    device = torch_xla.device()
    on_device = [t.to(device) for t in (y, x, a, b, c, slots)]
    y_, x_, a_, b_, c_, slots_ = on_device
    got = add_products(y_, x_, a_, [b_, c_], Groups.of(slots_, 4)).cpu()
    torch.testing.assert_close(got, wanted)
    assert got[slots < 0].equal(y[slots < 0])
