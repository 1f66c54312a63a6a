"""Sampling as pure functions of tensors with static shapes.

The device runs them as programs, and the host runs them on CPU tensors for the rows
that need it, so that one request draws the same token on either. The order of the
steps and what each does are those of vLLM 0.13.0's v1/sample/sampler.py: mask, edits,
temperature, min-p, top-k, top-p, draw, logprobs.

A filter is a threshold on the scaled logits, found without sorting the vocabulary:

- top-k of at most SMALL_K: the blocks with the largest maxima hold the largest values,
  so only they are looked at;
- anything else: the threshold's 32 bits are searched, one sum over the row a step.

The draw is the inverse of the cumulative distribution in the order of token ids, at
one uniform number a row. It does not depend on how the threshold was found: a row's
token does not change with the filters of its batch's other rows.

Tested by tests/engine/test_sampling.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import search_loop

# The largest top-k that needs no search.
SMALL_K = 64
# A row's cumulative distribution is that of blocks of tokens, then of one block's.
BLOCK = 128
# Below this temperature a row is greedy (vLLM's _SAMPLING_EPS).
GREEDY_BELOW = 1e-5
# A uniform number is this many bits in two int32.
UNIFORM_BITS = 48
# Rows of the params of `sample`: float32 as its bits, or int32.
TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P, UNIFORM_HIGH, UNIFORM_LOW = range(6)
NUM_PARAMS = 6
# An entry of `edit`: (count << 1) | in_prompt.
IN_PROMPT, COUNT_SHIFT = 1, 1
# The condition of a ban that always holds.
ALWAYS = -1

_HALF = UNIFORM_BITS // 2
_LOWEST = torch.finfo(torch.float32).min
# The order of -inf among all floats sorted as signed numbers: negative NaNs are below.
_MINUS_INF_KEY = 0x007FFFFF


def float_rows(packed: torch.Tensor) -> torch.Tensor:
    """The float32 whose bits an int32 tensor holds."""
    if packed.device.type != "xla":
        return packed.view(torch.float32)
    return _bitcast()(packed)


@functools.cache
def _bitcast() -> Callable[[torch.Tensor], torch.Tensor]:
    """HLO's bitcast-convert. torch_xla has view(dtype) computed on the host."""
    from torch_xla.core import xla_builder, xla_op_registry

    return xla_op_registry.register(
        "xla_ops_bitcast_float32", lambda x: x.bitcast(xla_builder.Type.F32)
    )


def mask(logits: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Logits with -inf where a token's bit is 0.

    Args:
        logits: [L, V] float32.
        bits: [L, ceil(V / 32)] int32, token t in bit t % 32 of word t // 32.
    """
    rows, vocab = logits.shape
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    # Not `>>`, which torch_xla makes a division by a power of two.
    allowed = torch.bitwise_right_shift(bits.unsqueeze(-1), shifts) & 1
    allowed = allowed.reshape(rows, -1)[:, :vocab]
    return torch.where(allowed != 0, logits, -math.inf)


def edit(
    logits: torch.Tensor,
    packed: torch.Tensor,
    prev: torch.Tensor,
    num_edits: int,
    num_bans: int,
) -> torch.Tensor:
    """Logits with biases, penalties and bans at single (row, token) pairs.

    The token that a row sampled last may be known to the device only. It then counts
    as one more output token, and decides the bans that depend on it.

    Args:
        logits: [L, V] float32.
        packed: int32: the flat index, the counts and the bias of each edit; the flat
            index and the condition of each ban; the repetition, frequency and presence
            penalty of each row, and the row of `prev` that it sampled last or -1.
            The pairs of the edits differ, but for copies of one whole edit.
        prev: int32, the last step's tokens.
        num_edits: how many edits `packed` holds.
        num_bans: how many bans `packed` holds.
    """
    rows, vocab = logits.shape
    index, counts, bias, ban, condition, repetition, frequency, presence, source = (
        torch.split(packed, [num_edits] * 3 + [num_bans] * 2 + [rows] * 4)
    )
    repetition, frequency, presence = map(float_rows, (repetition, frequency, presence))
    pending = torch.where(source >= 0, prev[source.clamp(min=0).long()], -1)

    def penalised(
        x: torch.Tensor, row: torch.Tensor, count: torch.Tensor, in_prompt: torch.Tensor
    ) -> torch.Tensor:
        scale = torch.where(in_prompt | (count > 0), repetition[row], 1.0)
        x = torch.where(x > 0, x * (1.0 / scale), x * scale)
        x = x - frequency[row] * count
        return x - presence[row] * (count > 0)

    flat = logits.reshape(-1)
    index = index.long()
    row = index // vocab
    is_pending = pending[row] == index - row * vocab
    count = torch.bitwise_right_shift(counts, COUNT_SHIFT) + is_pending
    x = penalised(flat[index] + float_rows(bias), row, count, (counts & IN_PROMPT) != 0)
    edited = flat.scatter(0, index, x)

    # A pending token that no edit names.
    every = torch.arange(rows, device=logits.device)
    last = every * vocab + pending.clamp(min=0)
    named = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    named = named.scatter_add(0, row, is_pending.to(torch.int32))
    one = torch.ones_like(pending)
    x = torch.where(
        (pending >= 0) & (named == 0),
        penalised(flat[last], every, one, one < 0),
        edited[last],
    )
    edited = edited.scatter(0, last, x)

    ban = ban.long()
    holds = (condition == ALWAYS) | (condition == pending[ban // vocab])
    x = torch.where(holds, -math.inf, math.inf).to(torch.float32)
    return edited.scatter_reduce(0, ban, x, "amin").reshape(rows, vocab)


def top_values(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, largest first, and where they are.

    Like torch.topk, but -inf comes back as the lowest finite float32. Blocks are
    narrowed down to the k with the largest maxima until few candidates are left: every
    maximum of those is at least as large as anything outside of them.
    """
    rows, n = x.shape
    x = x.clamp(min=_LOWEST)  # so that padding, which is -inf, is never among them
    places = None
    while n > 16 * k:
        size = 1 << max(1, math.ceil(math.log2(math.sqrt(n / k))))
        blocks = -(-n // size)
        x = F.pad(x, (0, blocks * size - n), value=-math.inf)
        x = x.reshape(rows, blocks, size)
        chosen = torch.topk(x.amax(-1), k).indices.unsqueeze(-1)
        inside = chosen * size + torch.arange(size, device=x.device)
        x = x.gather(1, chosen.expand(-1, -1, size)).reshape(rows, -1)
        inside = inside.reshape(rows, -1)
        # Places past the end belong to padding, which is never chosen.
        places = inside if places is None else places.gather(1, inside.clamp(max=n - 1))
        n = k * size
    values, indices = torch.topk(x, k)
    return values, indices if places is None else places.gather(1, indices)


def _float_of(key: torch.Tensor) -> torch.Tensor:
    """The float32 whose rank among all bit patterns is `key`, at least -inf.

    Denormal ones are 0, as which a device may compare them.
    """
    signed = key.clamp(min=_MINUS_INF_KEY) - (1 << 31)
    bits = torch.where(signed >= 0, signed, signed ^ 0x7FFFFFFF)
    bits = torch.where(bits & 0x7F800000 == 0, 0, bits)
    return float_rows(bits.to(torch.int32))


def _search(
    z: torch.Tensor, counting: torch.Tensor, top: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The largest t of each row for which the weights of z >= t sum to the target.

    A token weighs 1 in a row that counts, else exp(z - top). All but z are [L, 1].
    """
    if z.device.type == "xla":
        columns = [x.reshape(-1) for x in (counting.float(), top, target)]
        return search_loop.SEARCH(z, *columns).unsqueeze(-1)
    weight = torch.where(counting, 1.0, torch.exp(z - top))
    key = torch.zeros_like(target, dtype=torch.int64)
    for shift in range(31, -1, -1):
        candidate = key + (1 << shift)
        total = torch.where(z >= _float_of(candidate), weight, 0.0)
        key = torch.where(total.sum(-1, keepdim=True) >= target, candidate, key)
    return _float_of(key)


def _mass_at(t: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    # t == top may be infinite.
    return torch.where(t == top, 1.0, torch.exp(t - top))


def _top_p_tie(
    wanted: torch.Tensor, above: torch.Tensor, t: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """How many of the tokens at the threshold top-p keeps: those that begin in it."""
    return torch.ceil((wanted - above) / _mass_at(t, top)).clamp(min=1)


def thresholds(
    z: torch.Tensor,
    top: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    variant: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest scaled logit kept, and how many tokens of this very value are.

    Args:
        z: [L, V] float32, logits divided by the temperature.
        top: [L, 1], their largest.
        top_k: [L, 1] int32, V where there is none.
        top_p: [L, 1] float32, 1 where there is none.
        log_min_p: [L, 1] float32, -inf where there is none.
        variant: which rows are promised: "plain", no top-k nor top-p; "topk", a top-k
            of at most SMALL_K wherever there is a top-k or top-p; "search", no
            row with both a top-k and a top-p; "search2", anything.

    Returns:
        Both [L, 1] float32. The ties kept are those of the highest token ids, as in
        vLLM's ascending sort, and all of them but at the end of top-p.
    """
    vocab = z.shape[1]
    all_ties = torch.full_like(top, math.inf)
    least = torch.where(log_min_p == 0, top, top + log_min_p)
    if variant == "plain":
        return least, all_ties
    has_k, has_p = top_k < vocab, top_p < 1
    if variant == "topk":
        values, _ = top_values(z, min(SMALL_K, vocab))
        last = (top_k.clamp(max=values.shape[1]) - 1).long()
        kth = values.gather(1, last)
        t = torch.where(has_k & (kth > _LOWEST), torch.maximum(least, kth), least)
        mass = torch.exp(values - top)
        total = torch.where(values > t, mass, 0.0).sum(-1, keepdim=True)
        total = total + (z == t).sum(-1, keepdim=True) * _mass_at(t, top)
        wanted = top_p * total
        before = mass.cumsum(-1) - mass
        kept = ((before < wanted) & (values >= t)).sum(-1, keepdim=True)
        tp = values.gather(1, (kept - 1).clamp(min=0))
        above = torch.where(values > tp, mass, 0.0).sum(-1, keepdim=True)
        has_p = has_p & has_k
    else:
        mass = torch.exp(z - top)
        total = torch.where(z >= least, mass, 0.0).sum(-1, keepdim=True)
        target = torch.where(has_k, top_k.to(z.dtype), top_p * total)
        found = _search(z, has_k, top, target)
        t = torch.where(has_k, torch.maximum(least, found), least)
        if variant == "search2":
            total = torch.where(z >= t, mass, 0.0).sum(-1, keepdim=True)
            found = _search(z, has_k & ~has_k, top, top_p * total)
        wanted = top_p * total
        tp = found
        above = torch.where(z > tp, mass, 0.0).sum(-1, keepdim=True)
    ties = torch.where(has_p, _top_p_tie(wanted, above, tp, top), all_ties)
    return torch.where(has_p, tp, t), ties


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first place where a cumulative sum exceeds target, at most its last step."""
    below = (cumulative <= target).sum(-1, keepdim=True)
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(below, last)


def draw(
    z: torch.Tensor,
    top: torch.Tensor,
    t: torch.Tensor,
    ties: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """The token at which the cumulative distribution passes `uniform`, [L, 1] int64.

    Args:
        z: [L, V] float32, logits divided by the temperature.
        top: [L, 1] float32, their largest.
        t: [L, 1] float32, the smallest logit kept.
        ties: [L, 1] float32, how many of those equal to t are kept, from the last.
        uniform: [L, 1] float64 in [0, 1).
    """
    rows, vocab = z.shape
    blocks = -(-vocab // BLOCK)
    z = F.pad(z, (0, blocks * BLOCK - vocab), value=-math.inf)
    z = z.reshape(rows, blocks, BLOCK)
    top3, t3 = top.unsqueeze(-1), t.unsqueeze(-1)
    above = torch.where(z > t3, torch.exp(z - top3), 0.0).sum(-1)
    equal = (z == t3).sum(-1).to(torch.float32)
    later = equal.sum(-1, keepdim=True) - equal.cumsum(-1)
    tied = torch.minimum((ties - later).clamp(min=0), equal)
    # Sums of sums in double: the tail of a large vocabulary keeps its share.
    mass_at_t = _mass_at(t, top)
    mass = above.double() + tied.double() * mass_at_t
    cumulative = mass.cumsum(-1)
    target = uniform * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    target = target - (cumulative.gather(1, block) - mass.gather(1, block))

    z = z.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    equal = (z == t).to(torch.float32)
    later = later.gather(1, block) + equal.sum(-1, keepdim=True) - equal.cumsum(-1)
    weight = torch.where(z > t, torch.exp(z - top), 0.0)
    weight = torch.where((equal > 0) & (later < ties), mass_at_t, weight)
    token = block * BLOCK + _first_above(weight.double().cumsum(-1), target)
    return token.clamp(max=vocab - 1)


def scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logits over the temperature [L, 1]; as they are where a row is greedy."""
    return logits / torch.where(temperature < GREEDY_BELOW, 1.0, temperature)


def _kept(z: torch.Tensor, t: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """z with -inf where the filters drop a token."""
    equal = (z == t).to(torch.int32)
    later = equal.sum(-1, keepdim=True) - equal.cumsum(-1)
    return torch.where((z > t) | ((equal > 0) & (later < ties)), z, -math.inf)


def sample(
    logits: torch.Tensor,
    params: torch.Tensor,
    variant: str,
    with_processed: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The tokens of a step, [L] int32, and the filtered logits where asked for.

    Args:
        logits: [L, V] float32, masked and edited.
        params: [NUM_PARAMS, L] int32, the rows named above.
        variant: see `thresholds`.
        with_processed: return what vLLM calls processed logits, too.
    """
    floats = float_rows(params).unsqueeze(-1)
    ints = params.unsqueeze(-1)
    temperature = floats[TEMPERATURE]
    z = scaled(logits, temperature)
    top = z.amax(-1, keepdim=True)
    t, ties = thresholds(
        z,
        top,
        ints[TOP_K],
        floats[TOP_P],
        floats[LOG_MIN_P],
        variant,
    )
    processed = (_kept(z, t, ties),) if with_processed else ()
    # Greedy: the first of the largest. A row without any token left takes its first.
    greedy = (temperature < GREEDY_BELOW) | (top == -math.inf)
    high, low = ints[UNIFORM_HIGH].double(), ints[UNIFORM_LOW].double()
    uniform = (high + low * 2.0**-_HALF) * 2.0**-_HALF
    token = draw(
        z,
        top,
        torch.where(greedy, top, t),
        torch.where(greedy, math.inf, ties),
        torch.where(greedy, 0.0, uniform),
    )
    return token.squeeze(-1).to(torch.int32), *processed


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    top = logits.amax(-1, keepdim=True)
    shifted = logits - top
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, n: int, normalise: bool = True
) -> torch.Tensor:
    """What is reported of each row's token and of its n likeliest ones.

    Args:
        logits: [L, V] float32.
        tokens: [L] int32.
        n: how many of the likeliest.
        normalise: logprobs, not logits.

    Returns:
        [L, 3 + 2n] float32, one transfer: the token, its rank from 1, its logprob, n
        logprobs and n token ids. float32 holds every integer up to 2**24.
    """
    if normalise:
        logits = log_softmax(logits)
    token = tokens.long().unsqueeze(-1)
    chosen = logits.gather(1, token)
    rank = (logits >= chosen).sum(-1, keepdim=True)
    columns = [token.float(), rank.float(), chosen]
    if n:
        values, places = top_values(logits, n)
        values = torch.where(values <= _LOWEST, -math.inf, values)
        columns += [values, places.float()]
    return torch.cat(columns, -1)
