"""Fine-tunes a Hugging Face checkpoint on a text, by low-rank adapters.

SPDX-License-Identifier: Apache-2.0

    python examples/llm/finetune_lora.py --model DIR --text FILE --out DIR2

FILE holds texts with empty lines between them. They are packed into rows of tokens,
end to end (training.py); the checkpoint's weights stay, and beside each matrix W of a
layer two thin ones are trained, W + scale * B A (Hu et al., LoRA, arXiv:2106.09685).
DIR2 gets the checkpoint with the products added to its weights, which generate.py and
others read as they read the first, and a picture of the loss.
"""

import argparse
import random
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import tokenizer as tokenizers
import weights
from config import ModelConfig
from files import short
from model import Decoder
from options import (
    Parser,
    check_out,
    errors_as_lines,
    integer,
    positive,
    read_text,
    warn,
)
from training import batches, plot, start_xla, train

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
KEPT_FILES = ("config.json", "generation_config.json", "tokenizer.json")


class Adapted(nn.Module):
    """A linear layer and its adapter, which begins as zero. Only that is trained."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        # float32, whatever the weights are: small steps would be lost.
        down = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        device = base.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank).to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(x, self.down.to(x.dtype))
        return self.base(x) + F.linear(low, self.up.to(x.dtype)) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        change = self.up @ self.down * self.scale
        self.base.weight.copy_(self.base.weight.float() + change)
        return self.base


def adapt(decoder: Decoder, rank: int, scale: float) -> list[nn.Parameter]:
    """Puts adapters into every layer and returns what is to be trained."""
    parameters: list[nn.Parameter] = []
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if name in ADAPTED and isinstance(child, nn.Linear):
                adapter = Adapted(child, rank, scale)
                setattr(module, name, adapter)
                parameters += [adapter.down, adapter.up]
    return parameters


def merge(decoder: Decoder) -> None:
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Adapted):
                setattr(module, name, child.merged())


def rows_of(text: str, tokenizer, config: ModelConfig, longest: int) -> list[list[int]]:
    """The texts as tokens, each with what ends one, cut to `longest`.

    Raises:
      ValueError: no text has a token that follows another, or the tokens are not of
        this model.
    """
    end = sorted(config.eos_token_ids)[:1]
    texts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    whole = [[*tokenizers.encode(tokenizer, t), *end] for t in texts]
    for t, row in zip(texts, whole, strict=True):
        unknown = [i for i in row if not 0 <= i < config.vocab_size]
        if unknown:
            raise ValueError(
                f"finetune_lora: tokens must be in 0..{config.vocab_size - 1}, got "
                f"{unknown[0]} of {short(t)}; is tokenizer.json that of this model?"
            )
    # A text of one token has none to be learned.
    rows = [row[:longest] for row in whole if len(row) > 1]
    if not rows:
        raise ValueError(
            f"--text must have a text of at least 2 tokens, got {len(texts)} shorter"
        )
    num_cut = sum(len(row) > longest for row in whole)
    if num_cut:
        warn(f"{num_cut} of {len(texts)} texts are cut to {longest} tokens")
    return rows


def save(decoder: Decoder, source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT_FILES:
        if (source / name).exists():
            shutil.copy(source / name, out / name)
    named = weights.unpacked(decoder.state_dict())
    tensors = {name: t.cpu().contiguous() for name, t in named.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    for name in ("--model", "--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rank", type=integer(1), default=8)
    parser.add_argument("--scale", type=positive, default=2.0)
    parser.add_argument("--epochs", type=integer(1), default=1)
    parser.add_argument("--tokens", type=integer(16), default=1024, help="of a step")
    parser.add_argument("--lr", type=positive, default=2e-4)
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0)
    args = parser.parse_args(argv)
    with errors_as_lines("lower --tokens or --rank"):
        run(args)


def run(args: argparse.Namespace) -> None:
    # What can be wrong is looked at before anything is loaded.
    config = ModelConfig.from_folder(args.model)
    tokenizer = tokenizers.load(args.model)
    longest = min(args.tokens, config.max_len)
    rows = rows_of(read_text(args.text), tokenizer, config, longest)
    check_rank(args.rank, config)
    weights.check(args.model, config)
    check_out(args.out, args.model)

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    device = start_xla(args.device)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    decoder = weights.load(args.model, config, longest, dtype, device)
    parameters = adapt(decoder, args.rank, args.scale)
    steps = [
        batch
        for _ in range(args.epochs)
        for batch in batches(rows, args.tokens, max(1, args.tokens // 16))
    ]
    count = sum(p.numel() for p in parameters)
    print(f"{len(rows)} texts, {len(steps)} steps, {count} parameters to train")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    with tqdm(total=len(steps), unit="step", disable=None) as bar:
        losses = train(
            decoder, parameters, steps, optimizer, report=lambda _: bar.update()
        )
    merge(decoder)
    save(decoder, args.model, args.out)
    plot(losses, args.out / "loss.png")
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; wrote {args.out}")


def check_rank(rank: int, config: ModelConfig) -> None:
    """Raises a ValueError for adapters that are larger than what they adapt."""
    most = min(config.hidden_size, config.intermediate_size)
    if rank > most:
        raise ValueError(
            f"--rank must be at most {most}, the least size of a matrix by "
            f"config.json, got {rank}"
        )


if __name__ == "__main__":
    main()
