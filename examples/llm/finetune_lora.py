"""Fine-tunes a Hugging Face checkpoint on a text, by low-rank adapters.

SPDX-License-Identifier: Apache-2.0

    python examples/llm/finetune_lora.py --model DIR --text FILE --out DIR2

FILE holds texts with empty lines between them. They are packed into rows of tokens,
end to end (training.py); the checkpoint's weights stay, and beside each matrix W of a
layer two thin ones are trained, W + scale * B A (Hu et al., LoRA, arXiv:2106.09685).
DIR2 gets the checkpoint with the products added to its weights, which generate.py and
others read as they read the first, and a picture of the loss.
"""

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
from model import Decoder
from options import Parser, integer
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
    """The texts as tokens, each with what ends one, cut to `longest`."""
    end = sorted(config.eos_token_ids)[:1]
    texts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return [[*tokenizers.encode(tokenizer, t), *end][:longest] for t in texts]


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
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--epochs", type=integer(1), default=1)
    parser.add_argument("--tokens", type=integer(16), default=1024, help="of a step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=integer(0), default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    device = start_xla(args.device)
    config = ModelConfig.from_folder(args.model)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    longest = min(args.tokens, config.max_len)
    decoder = weights.load(args.model, config, longest, dtype, device)
    tokenizer = tokenizers.load(args.model)
    rows = rows_of(args.text.read_text(), tokenizer, config, longest)
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


if __name__ == "__main__":
    main()
