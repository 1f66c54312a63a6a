#!/usr/bin/env python3
"""Checks the kernels of attention's gradient against float64, and times them.

    check_attention_backward.py --lib-dir DIR [--out results.json] [--quick] [--cpu]
                                [--only WORD] [--speed]

Needs torch, a GPU, and libxla_ops_attention_backward_cuda.so in DIR; neither XLA nor
the wheel. --quick runs a small set, for compute-sanitizer; --cpu checks the CPU library
by the same cases; --only those whose text has the word. --speed adds TFLOP/s of bf16,
causal, 16k tokens in all, 2048 columns, beside torch's SDPA by FlashAttention and by
cuDNN. Exit status 1 if a case fails.

A case draws a batch (query and KV length of each sequence), lays its keys out in rows
or pages, and fills with NaN what no query may see. Errors are held to twice those of
plain torch in the case's dtype, and a floor.
"""

import argparse
import itertools
import json
import statistics
import sys
import traceback

import torch

import ffi_call

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FLOOR = 1e-5
GUARD = 64  # elements after a result, which have to stay as they are


def visible(case, rows, length, device):
    position = torch.arange(rows, device=device)[:, None] + length - rows
    token = torch.arange(length, device=device)
    left, right = case.get("left", -1), case.get("right", -1)
    seen = torch.ones(rows, length, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= token >= position - left
    if right >= 0:
        seen &= token <= position + right
    return seen, (position - token).abs()


def attend(case, query, keys, values, sinks, slopes, dtype):
    """A sequence: out [rows, heads, dim] and lse [heads, rows], in `dtype`."""
    rows, heads, dim = query.shape
    length, kv_heads, _ = keys.shape
    seen, distance = visible(case, rows, length, query.device)
    keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
    logits = torch.einsum("ihd,jhd->hij", query, keys) * case.get("scale", dim**-0.5)
    if cap := case.get("cap", 0.0):
        logits = cap * torch.tanh(logits / cap)
    if slopes is not None:
        logits = logits - slopes.to(dtype)[:, None, None] * distance.to(dtype)
    some = seen.any(-1)[:, None] if length else seen.new_zeros(rows, 1)
    # Rows that see nothing keep numbers, so that they have derivatives, of zero.
    logits = logits.masked_fill(~seen & some, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, rows, 1)], -1)
    if not logits.shape[-1]:
        return query * 0, logits.new_full((heads, rows), torch.inf)
    weights = logits.softmax(-1)[..., :length]
    out = torch.where(some[..., None], torch.einsum("hij,jhd->ihd", weights, values), 0)
    return out, torch.where(some[:, 0], logits.logsumexp(-1), torch.inf)


class Batch:
    """A case's operands, and each sequence's keys and values."""

    def __init__(self, case, device, seed):
        self.case, self.device = case, device
        self.random = torch.Generator().manual_seed(seed)
        self.dtype = DTYPES[case["dtype"]]
        self.heads, self.kv_heads, self.dim = case["heads"]
        self.seqs = case["seqs"]
        tokens = sum(rows for rows, _ in self.seqs) + case.get("pad_tokens", 0)
        self.query = self.draw(tokens, self.heads, self.dim)
        self.grad_out = self.draw(tokens, self.heads, self.dim)
        self.grad_lse = self.draw(self.heads, tokens, dtype=torch.float32)
        self.sinks = self.slopes = None
        padding = case.get("pad_seqs", 0)
        if case.get("sinks"):
            self.sinks = self.draw(self.heads, dtype=torch.float32) * 3
        if case.get("slopes"):
            of = (len(self.seqs) + padding,) if case["slopes"] == 2 else ()
            self.slopes = self.draw(*of, self.heads, dtype=torch.float32).abs() / 8
        ends = [0, *itertools.accumulate(rows for rows, _ in self.seqs)]
        self.starts = self.int32(ends + ends[-1:] * padding)
        self.num_seqs = self.int32([len(self.seqs)]) if padding else None
        self.fp8 = case.get("fp8")
        self.scales = (None, None)
        if self.fp8:
            shape = len(self.seqs) + padding, self.kv_heads
            self.scales = [
                self.draw(*shape, dtype=torch.float32).abs() + 0.5 for _ in "kv"
            ]
        (self.in_pages if case.get("page") else self.in_rows)(padding)

    def draw(self, *shape, dtype=None):
        t = torch.randn(shape, generator=self.random)
        return t.to(self.dtype if dtype is None else dtype).to(self.device)

    def int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def new_tokens(self, count):
        """Keys and values of a sequence, as they are stored."""
        stored = FP8[self.fp8] if self.fp8 else self.dtype
        return [self.draw(count, self.kv_heads, self.dim).to(stored) for _ in "kv"]

    def of_seqs(self, tokens):
        """What stored keys and values of each sequence mean."""
        if not self.fp8:
            return tokens
        return [
            [
                t.float() * scale[s][:, None]
                for t, scale in zip(kv, self.scales, strict=True)
            ]
            for s, kv in enumerate(tokens)
        ]

    def poisoned(self, *shape):
        return torch.full(shape, torch.nan, device=self.device).to(
            FP8[self.fp8] if self.fp8 else self.dtype
        )

    def in_rows(self, padding):
        pad, slack = self.case.get("leftpad", 0), self.case.get("slack", 0)
        room = [pad + length + slack for _, length in self.seqs]
        starts = [0, *itertools.accumulate(room)]
        rows = starts[-1] + 3
        packed = self.case.get("packed")
        width = (1 + bool(packed)) * self.kv_heads
        key = self.poisoned(rows, width, self.dim)
        value = key if packed else self.poisoned(rows, width, self.dim)
        tokens = []
        for start, (_, length) in zip(starts, self.seqs, strict=False):
            kv = self.new_tokens(length)
            at = slice(start + pad, start + pad + length)
            key[at, : self.kv_heads] = kv[0]
            value[at, width - self.kv_heads :] = kv[1]
            tokens.append(kv)
        self.first = [start + pad for start in starts[:-1]]
        self.tokens = self.of_seqs(tokens)
        self.key, self.value = key, value
        used = [pad + length for _, length in self.seqs] + [0] * padding
        self.tables = [
            self.int32(starts + starts[-1:] * padding),
            self.int32(used) if slack else None,
            None,
            self.int32([pad] * len(used)) if pad else None,
        ]
        self.geometry = {
            "num_blocks": 1,
            "page_size": rows,
            "block_stride": 0,
            "page_stride": width * self.dim,
            "head_stride": self.dim,
            "key_offset": 0,
            "value_offset": (width - self.kv_heads) * self.dim,
        }

    def in_pages(self, padding):
        page = self.case["page"]
        counts = [-(-length // page) for _, length in self.seqs]
        blocks = sum(counts) + 2
        order = torch.randperm(blocks, generator=self.random).tolist()
        key, value = (
            self.poisoned(blocks, page, self.kv_heads, self.dim) for _ in "kv"
        )
        width = max(counts, default=0) + 1
        table, tokens = [], []
        for (_, length), count in zip(self.seqs, counts, strict=True):
            mine, order = order[:count], order[count:]
            kv = self.new_tokens(length)
            for cache, of_seq in zip((key, value), kv, strict=True):
                for i, block in enumerate(mine):
                    part = of_seq[i * page : (i + 1) * page]
                    cache[block, : len(part)] = part
            table.append(mine + [-7] * (width - count))
            tokens.append(kv)
        table += [[10**9] * width] * padding
        self.tokens = self.of_seqs(tokens)
        self.key, self.value = key, value
        lens = [length for _, length in self.seqs] + [0] * padding
        table = self.int32(table).reshape(len(table), width)
        self.tables = [None, self.int32(lens), table, None]
        self.geometry = {
            "num_blocks": blocks,
            "page_size": page,
            "block_stride": page * self.kv_heads * self.dim,
            "page_stride": self.kv_heads * self.dim,
            "head_stride": self.dim,
            "key_offset": 0,
            "value_offset": 0,
        }

    def reference(self, dtype):
        """out, lse and the gradients by plain torch, in `dtype` throughout."""
        with torch.enable_grad():
            return self._reference(dtype)

    def _reference(self, dtype):
        leaf = lambda t: t.detach().to(dtype).requires_grad_()  # noqa: E731
        query = leaf(self.query)
        sinks = None if self.sinks is None else leaf(self.sinks)
        tokens = [[leaf(t) for t in kv] for kv in self.tokens]
        outs, lses = [], []
        for s, (keys, values) in enumerate(tokens):
            rows = slice(*self.starts[s : s + 2].tolist())
            slopes = self.slopes
            if slopes is not None and slopes.dim() == 2:
                slopes = slopes[s]
            o, e = attend(self.case, query[rows], keys, values, sinks, slopes, dtype)
            outs.append(o)
            lses.append(e)
        tail = query[sum(rows for rows, _ in self.seqs) :]
        outs.append(tail * 0)
        lses.append(torch.full((self.heads, len(tail)), torch.inf).to(query))
        out, lse = torch.cat(outs), torch.cat(lses, 1)
        leaves = [query, *itertools.chain(*tokens), *([] if sinks is None else [sinks])]
        total = (out * self.grad_out.to(dtype)).sum()
        if self.case.get("grad_lse"):
            finite = torch.where(lse == torch.inf, 0, lse)
            total = total + (finite * self.grad_lse.to(dtype)).sum()
        total = total + sum(0 * t.sum() for t in leaves)
        found = list(torch.autograd.grad(total, leaves))
        grads = {"dq": found[0], "dsinks": found[-1]}
        if self.wants_dkv:
            for i, name in enumerate(("dk", "dv")):
                whole = torch.zeros(
                    self.geometry["page_size"], self.kv_heads, self.dim
                ).to(query)
                for s, first in enumerate(self.first):
                    t = found[1 + 2 * s + i]
                    whole[first : first + len(t)] = t
                grads[name] = whole
        return out.detach(), lse.detach(), grads

    @property
    def wants_dkv(self):
        return not self.case.get("page") and not self.fp8

    def prepare(self, library, out, lse):
        """Returns a call of the handler, its results by name and what holds them."""
        case = self.case
        wants = {
            "wants_dq": case.get("wants_dq", True),
            "wants_dkv": case.get("wants_dkv", self.wants_dkv),
            "wants_dsinks": self.sinks is not None,
        }
        kv_shape = self.geometry["page_size"], self.kv_heads, self.dim
        shapes = {
            "dq": (self.query.shape, self.dtype, wants["wants_dq"]),
            "dk": (kv_shape, self.dtype, wants["wants_dkv"]),
            "dv": (kv_shape, self.dtype, wants["wants_dkv"]),
            "dsinks": ((self.heads,), torch.float32, wants["wants_dsinks"]),
        }
        guarded, results = {}, {}
        for name, (shape, dtype, is_wanted) in shapes.items():
            shape = shape if is_wanted else (0,)
            size = torch.Size(shape).numel()
            whole = torch.full((size + GUARD,), torch.nan, device=self.device)
            guarded[name] = whole.to(dtype)
            results[name] = guarded[name][:size].view(shape)
        sizes = (len(self.query), self.heads, self.kv_heads, self.dim)
        (size,) = library.plan((*sizes, len(self.starts) - 1), 1)
        workspace = torch.full((size,), 255, dtype=torch.uint8, device=self.device)
        grad_lse = None
        if case.get("grad_lse"):
            # Where nothing is seen it does not count.
            grad_lse = torch.where(lse == torch.inf, torch.inf, self.grad_lse)
        is_paged = bool(case.get("page"))
        target = "paged_attention" if is_paged else "flash_attn_varlen"
        call = library.call(
            f"{target}_backward",
            [
                *(self.grad_out, self.query, self.key, self.value, out, lse, grad_lse),
                *(self.starts, *self.tables, self.num_seqs, self.slopes, self.sinks),
                *self.scales,
            ],
            [*results.values(), workspace],
            {
                "scale": float(case.get("scale", self.dim**-0.5)),
                "window_left": case.get("left", -1),
                "window_right": case.get("right", -1),
                "soft_cap": float(case.get("cap", 0.0)),
                "kv_cache_dtype": self.fp8 or "auto",
                "paged": is_paged,
                "num_kv_heads": self.kv_heads,
                **self.geometry,
                "deterministic": case.get("deterministic", False),
                **wants,
            },
        )
        return call, results, guarded

    def run(self, library, out, lse):
        """Calls the handler; returns the results by name."""
        call, results, guarded = self.prepare(library, out, lse)
        call()
        for name, t in guarded.items():
            assert t[-GUARD:].isnan().all(), f"{name} was written past its end"
        return {name: t for name, t in results.items() if t.numel()}


def rounding_of_dsinks(batch, out, lse):
    """Four standard deviations of what `out`, rounded, does to dsinks' sum of rows.

    The reference rounds it too, but of a few heads one's error may be small by chance.
    """
    shares = torch.exp(batch.sinks.double()[:, None] - lse)
    parts = (batch.grad_out.double() * out).square().sum(-1).T
    eps = torch.finfo(batch.dtype).eps
    return 4 * eps / 12**0.5 * (shares.square() * parts).sum(-1).sqrt().max().item()


def check(library, device, case, seed):
    batch = Batch(case, device, seed)
    exact_out, exact_lse, exact = batch.reference(torch.float64)
    _, _, rounded = batch.reference(batch.dtype)
    out, lse = exact_out.to(batch.dtype), exact_lse.float()
    got = batch.run(library, out, lse)
    worst = {}
    for name, t in got.items():
        assert t.isfinite().all(), f"{name} has {(~t.isfinite()).sum()} not finite"
        error = (t.double() - exact[name]).abs().max().item()
        allowed = (rounded[name].double() - exact[name]).abs().max().item()
        bound = 2 * allowed + FLOOR * max(exact[name].abs().max().item(), 1.0)
        if name == "dsinks":
            bound += rounding_of_dsinks(batch, exact_out, exact_lse)
        worst[name] = error / bound
        assert error <= bound, f"{name} is off by {error:.3g}, of {bound:.3g}"
    again = batch.run(library, out, lse)
    for name, t in again.items():
        if name in ("dk", "dv") or case.get("deterministic"):
            assert torch.equal(t, got[name]), f"{name} differs in two runs"
    return worst


MIXED = [(1, 37), (23, 23), (9, 50), (1, 1), (0, 12), (5, 3), (2, 0), (70, 130)]
DIMS = (32, 40, 64, 96, 128, 192, 256)
FEATURES = {
    "full": {},
    "causal": {"right": 0},
    "window": {"left": 19, "right": 0},
    "both sides": {"left": 9, "right": 5},
    "cap": {"right": 0, "cap": 5.0},
    "slopes": {"right": 0, "slopes": 1},
    "slopes of sequences": {"right": 0, "slopes": 2},
    "sinks": {"right": 0, "sinks": True},
    "lse": {"right": 0, "grad_lse": True},
    "padding": {"right": 0, "pad_tokens": 5, "pad_seqs": 2, "sinks": True},
    "left padding": {"right": 0, "leftpad": 3, "slack": 5},
    "packed": {"right": 0, "packed": True},
    "deterministic": {"right": 0, "deterministic": True, "sinks": True},
    "all": {"left": 30, "right": 2, "cap": 9.0, "slopes": 2, "sinks": True}
    | {"grad_lse": True, "leftpad": 2, "slack": 1, "pad_seqs": 1, "scale": 0.3},
}


def cases(quick):
    dims = (40, 64, 128) if quick else DIMS
    for dtype, (i, dim) in itertools.product(DTYPES, enumerate(dims)):
        for j, (name, features) in enumerate(FEATURES.items()):
            if quick and (i + j) % 3:
                continue
            heads = ((4, 2), (3, 3), (8, 1))[(i + 2 * j) % 3]
            case = {"name": name, "dtype": dtype, "heads": (*heads, dim)}
            yield case | {"seqs": MIXED} | features
            if "leftpad" not in features and "packed" not in features:
                pages = {"page": (16, 5, 64)[j % 3], "seqs": MIXED}
                if j % 2 == 0:
                    yield case | features | pages
    common = {"heads": (4, 2, 64), "right": 0}
    for dtype in DTYPES:
        for fp8, page in itertools.product(FP8, (None, 16)):
            case = common | {"name": "8 bits", "dtype": dtype, "fp8": fp8}
            yield case | {"seqs": MIXED, "page": page, "sinks": True}
        for wants in ({"wants_dq": False}, {"wants_dkv": False}):
            yield common | {"name": "part", "dtype": dtype, "seqs": MIXED} | wants
        for seqs in ([], [(0, 5)], [(3, 0)], [(0, 0), (0, 0)]):
            case = common | {"name": "empty", "dtype": dtype, "seqs": seqs}
            yield case | {"sinks": True}
            yield case | {"pad_tokens": 3}
    if quick:
        return
    long = [[(1024, 1024)], [(500, 1500), (1, 900)], [(129, 64), (64, 129)]]
    long += [[(17, 17)] * 60, [(2000, 2000)]]
    for dtype, seqs, dim in itertools.product(DTYPES, long, (64, 128, 256)):
        for name in ("causal", "full", "deterministic", "all"):
            features = FEATURES[name]
            case = {"name": "long", "dtype": dtype, "heads": (4, 2, dim)}
            yield case | {"seqs": seqs} | features


def milliseconds(function, repeats=10, rounds=7):
    for _ in range(3):
        function()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / repeats)
    return statistics.median(found)


def peer(backend, q, k, v, grad):
    """ms of SDPA's backward; what it says where it cannot."""
    import torch.nn.attention as attention

    leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
    try:
        with torch.enable_grad(), attention.sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                *leaves, is_causal=True
            )
        grad = grad.transpose(1, 2)
        return milliseconds(
            lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
        )
    except RuntimeError as error:
        return str(error)[:200]


def speed(library, tokens=16384, hidden=2048):
    """Of bf16, causal; every head has keys and values of its own."""
    from torch.nn.attention import SDPBackend

    for length, dim in itertools.product((4096, 16384), (64, 128, 256)):
        heads, count = hidden // dim, tokens // length
        case = {"dtype": "bf16", "heads": (heads, heads, dim), "right": 0}
        batch = Batch(case | {"seqs": [(length, length)] * count}, "cuda", 0)
        shape = (count, length, heads, dim)
        q, grad = batch.query.view(shape), batch.grad_out.view(shape)
        k, v = (t[:tokens].view(shape) for t in (batch.key, batch.value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(*(t.transpose(1, 2) for t in (q, k, v)), 0.0, True)
        out = out.transpose(1, 2).reshape(tokens, heads, dim).contiguous()
        lse = lse[..., :length].transpose(0, 1).reshape(heads, tokens).contiguous()
        # Forward's two products, of half of the square, and backward's five.
        flops = 2.5 * 4 * count * heads * dim * length * length / 2
        entry = {"length": length, "head_dim": dim, "heads": heads}
        for name, deterministic in (("ours", False), ("ours, deterministic", True)):
            batch.case["deterministic"] = deterministic
            call, *_ = batch.prepare(library, out, lse)
            entry[name] = flops / milliseconds(call) / 1e9
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ):
            ms = peer(backend, q, k, v, grad)
            if isinstance(ms, str):
                entry[f"{name} says"] = ms
                continue
            entry[name] = flops / ms / 1e9
            entry[f"of {name}"] = entry["ours"] / entry[name]
        print({n: round(x, 3) if isinstance(x, float) else x for n, x in entry.items()})
        sys.stdout.flush()
        yield entry


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default="", help="of cases, those with this word")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.cpu else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)
    library = ffi_call.Library(options.lib_dir, "attention_backward", device)
    results = {"torch": torch.__version__, "cases": 0, "failures": [], "worst": {}}
    if not options.cpu:
        results["device"] = torch.cuda.get_device_name()
    for i, case in enumerate(cases(options.quick)):
        if options.only not in str(case):
            continue
        results["cases"] += 1
        try:
            worst = check(library, device, case, i)
        except Exception:  # noqa: BLE001 - reported, and the exit status
            text = f"{case}: {traceback.format_exc()}"
            print("FAIL", text[:300], "...", text[-200:], flush=True)
            results["failures"].append(text)
            continue
        for name, share in worst.items():
            key = f"{case['dtype']} {name}"
            results["worst"][key] = max(share, results["worst"].get(key, 0.0))
    if options.speed:
        results["TFLOP/s"] = list(speed(library))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)
    print("largest errors, of what is allowed:", results["worst"])
    print(results["cases"], "cases,", len(results["failures"]), "failures")
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
