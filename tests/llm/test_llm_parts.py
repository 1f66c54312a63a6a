"""Tests the parts of examples/llm that need no model: block allocator, sampling,
and the search for copies in HLO."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hlo import Program, copies_of, step_programs
from kv_cache import BlockAllocator, blocks_for
from sampling import Sampling, sample


# --- Blocks. ------------------------------------------------------------------
def test_blocks_for():
    assert [blocks_for(n) for n in (0, 1, 16, 17, 33)] == [0, 1, 1, 2, 3]


def test_out_of_blocks_takes_none():
    allocator = BlockAllocator(4)
    allocator.take(3)
    with pytest.raises(MemoryError, match="got 1 of 4 where 2 are needed"):
        allocator.take(2)
    assert allocator.num_free == 1


def test_blocks_are_given_back_once():
    allocator = BlockAllocator(2)
    blocks = allocator.take(1)
    allocator.give_back(blocks)
    with pytest.raises(ValueError, match=f"must be taken, got {blocks[0]}"):
        allocator.give_back(blocks)
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        BlockAllocator(0)


@given(st.integers(1, 20), st.lists(st.integers(-8, 8), max_size=40))
def test_no_block_has_two_owners(num_blocks, moves):
    """Positive moves take that many blocks, others give an owner's back."""
    allocator, owners = BlockAllocator(num_blocks), []
    for move in moves:
        if move > 0 and move <= allocator.num_free:
            owners.append(allocator.take(move))
        elif move <= 0 and owners:
            allocator.give_back(owners.pop(move % len(owners)))
        taken = [block for owner in owners for block in owner]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(num_blocks))
        assert allocator.num_free == num_blocks - len(taken)


# --- Sampling. ----------------------------------------------------------------
def draws(probs: list[float], how: Sampling, count: int = 4000) -> list[float]:
    """Share of each token among `count` draws."""
    generator = torch.Generator().manual_seed(how.seed)
    logits = torch.tensor(probs).log()
    got = [sample(logits, how, generator) for _ in range(count)]
    return [got.count(token) / count for token in range(len(probs))]


def test_sampling_follows_the_distribution():
    probs = [0.1, 0.6, 0.3]
    # Five standard deviations of a share of 4000 draws are at most 0.04.
    assert draws(probs, Sampling(temperature=1.0)) == pytest.approx(probs, abs=0.04)
    cold = [p**2 / 0.46 for p in probs]  # temperature 1/2 squares
    assert draws(probs, Sampling(temperature=0.5)) == pytest.approx(cold, abs=0.04)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = [0.1, 0.6, 0.3]
    two = draws(probs, Sampling(temperature=1.0, top_p=0.7))
    assert two == pytest.approx([0.0, 2 / 3, 1 / 3], abs=0.04)
    assert two[0] == 0.0
    assert draws(probs, Sampling(temperature=1.0, top_p=0.5), 100) == [0.0, 1.0, 0.0]


def test_greedy():
    assert draws([0.1, 0.6, 0.3], Sampling(), 10) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), "temperature must be finite .* 0, got -1.0"),
        (dict(temperature=math.nan), "temperature must be finite .* 0, got nan"),
        (dict(temperature=math.inf), "temperature must be finite .* 0, got inf"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(top_p=math.nan), r"top_p must be in \(0, 1\], got nan"),
        (dict(seed=-1), r"seed must be in 0..2\^64 - 1, got -1"),
        (dict(seed=2**64), r"seed must be in .* got 18446744073709551616"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_no_temperature_is_too_small_or_too_large():
    logits = torch.tensor([1.0, 3.0, -torch.inf, 3.0 - 1e-6])
    for temperature in (1e-323, 1e-45, 1e-20):
        how = Sampling(temperature=temperature)
        assert sample(logits, how, how.generator(0)) == 1
    how = Sampling(temperature=1e308)
    generator = how.generator(0)
    seen = {sample(logits, how, generator) for _ in range(100)}
    assert seen == {0, 1, 3}  # evenly, of what is possible at all


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_overflowed_are_said_to_have(value):
    how = Sampling(temperature=1.0)
    with pytest.raises(ValueError, match=f"logits must be finite, got {value}"):
        sample(torch.tensor([0.0, value]), how, how.generator(0))


def test_every_seed_gives_each_prompt_its_own_stream():
    for seed in (0, 2**63, 2**64 - 1):
        how = Sampling(temperature=1.0, seed=seed)
        first, second = (torch.rand(4, generator=how.generator(i)) for i in range(2))
        again = torch.rand(4, generator=how.generator(0))
        assert torch.equal(first, again) and not torch.equal(first, second)


# --- HLO. ---------------------------------------------------------------------
SHAPE = "f32[8,16,2,64]"
IN_PLACE = """\
HloModule step, is_scheduled=true

ENTRY %step.1 (p0.1: f32[8,16,2,64], p1.2: f32[4,2,64]) -> (f32[8,16,2,64]) {
  %p0.1 = f32[8,16,2,64]{3,2,1,0} parameter(0)
  %p1.2 = f32[4,2,64]{2,1,0} parameter(1)
  %update.3 = f32[8,16,2,64]{3,2,1,0} custom-call(%p0.1, %p1.2), \
custom_call_target="xla_ops.t", output_to_operand_aliasing={{}: (0, {})}
  ROOT %tuple.4 = (f32[8,16,2,64]{3,2,1,0}) tuple(%update.3)
}
"""


def edited(old: str, new: str) -> str:
    assert old in IN_PLACE
    return IN_PLACE.replace(old, new)


def test_in_place_update_copies_nothing():
    assert copies_of(SHAPE, IN_PLACE) == 0


def test_copy_before_the_update_is_found():
    text = edited(
        "  %update.3 =",
        "  %copy.9 = f32[8,16,2,64]{3,2,1,0} copy(%p0.1)\n  %update.3 =",
    )
    assert copies_of(SHAPE, text) == 1
    assert copies_of("f32[9,16,2,64]", text) == 0


def test_asynchronous_copy_is_counted_once():
    shape = SHAPE + "{3,2,1,0}"
    text = edited(
        "  %update.3 =",
        f"  %copy-start.1 = ({shape}, {shape}, u32[]) copy-start(%p0.1)\n"
        f"  %copy-done.1 = {shape} copy-done(%copy-start.1)\n  %update.3 =",
    )
    assert copies_of(SHAPE, text) == 1


def test_update_without_aliasing_is_a_copy():
    text = edited(", output_to_operand_aliasing={{}: (0, {})}", "")
    assert copies_of(SHAPE, text) == 1


def test_update_of_two_caches():
    pair = f"({SHAPE}{{3,2,1,0}}, {SHAPE}{{3,2,1,0}})"
    both = edited("f32[8,16,2,64]{3,2,1,0} custom-call", f"{pair} custom-call")
    assert copies_of(SHAPE, both) == 1  # one of two results is aliased
    alias = "{{0}: (0, {}), {1}: (1, {})}"
    assert copies_of(SHAPE, both.replace("{{}: (0, {})}", alias)) == 0


def test_fusion_counts_once_and_its_inside_does_not():
    inside = """\
%fused (p: f32[8,16,2,64]) -> f32[8,16,2,64] {
  %p = f32[8,16,2,64]{3,2,1,0} parameter(0)
  ROOT %negate.1 = f32[8,16,2,64]{3,2,1,0} negate(%p)
}

ENTRY"""
    text = edited("ENTRY", inside).replace(
        "  %update.3 =",
        "  %f.1 = f32[8,16,2,64]{3,2,1,0} fusion(%p0.1), kind=kLoop, calls=%fused\n"
        "  %update.3 =",
    )
    assert copies_of(SHAPE, text) == 1


def test_called_computation_is_searched():
    """XLA for GPUs moves the work into a computation that the entry calls."""
    called = """\
%command_buffer (q: f32[8,16,2,64]) -> f32[8,16,2,64] {
  %q = f32[8,16,2,64]{3,2,1,0} parameter(0)
  ROOT %copy.1 = f32[8,16,2,64]{3,2,1,0} copy(%q)
}

ENTRY"""
    text = edited("ENTRY", called).replace(
        "  %update.3 =",
        "  %c.1 = f32[8,16,2,64]{3,2,1,0} call(%p0.1), to_apply=%command_buffer\n"
        "  %update.3 =",
    )
    assert copies_of(SHAPE, text) == 1


def test_only_programs_that_take_the_cache_are_read(tmp_path):
    (tmp_path / "m1.cpu_after_optimizations.txt").write_text(IN_PLACE)
    other = IN_PLACE.replace("8,16,2,64", "8,16,2,32")
    (tmp_path / "m2.cpu_after_optimizations.txt").write_text(other)
    (tmp_path / "m3.before_optimizations.txt").write_text(IN_PLACE)
    lines = IN_PLACE.splitlines(keepends=True)
    hands_on = "".join(line for line in lines if "custom" not in line).replace(
        "tuple(%update.3)", "tuple(%p0.1)"
    )
    (tmp_path / "m4.cpu_after_optimizations.txt").write_text(hands_on)
    found = step_programs(tmp_path, (8, 16, 2, 64), "float32")
    assert found == [Program("m1.cpu_after_optimizations.txt", 0, 1, 1, Counter())]
