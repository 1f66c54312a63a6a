"""Trains the small Llama checkpoint that the demo runs by default.

SPDX-License-Identifier: Apache-2.0

    python examples/llm/train_tiny.py --out examples/llm/tiny

Trains a byte-level BPE tokenizer and a Llama of 1.7 million parameters on the
stories of stories.py, and writes a Hugging Face checkpoint folder of less than
4 MB. It takes about ten minutes on a CPU core; nothing is downloaded.

The shape is chosen to exercise the demo, not to be the best model of its size:
eight layers (so sixteen caches must stay in place), grouped-query attention,
and head_dim 64, the smallest that paged attention takes.
"""

import math
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from options import Parser, integer
from stories import compose

HERE = Path(__file__).resolve().parent
BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 768
HELD_OUT = 48  # stories that are kept for validation
IGNORE = -100  # label that the loss skips


def train_tokenizer(stories: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        stories,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
        )
    )


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows of any length as (input_ids, labels), [rows, longest] each."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    return ids, labels


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    ids, labels = pad(rows)
    return model(input_ids=ids, labels=labels).loss.item()


def train(model, rows, held_out, epochs: int, batch: int, peak_lr: float) -> None:
    """AdamW with a short warm-up and a cosine; keeps the best weights seen."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.98),
    )
    steps = epochs * math.ceil(len(rows) / batch)
    warmup = min(50, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(
            (s + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * s / steps)
        ),
    )
    best, best_weights, start = math.inf, None, time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(rows)).tolist()
        for first in range(0, len(rows), batch):
            ids, labels = pad([rows[i] for i in order[first : first + batch]])
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(ids)
        held = validation_loss(model, held_out)
        if held < best:
            best = held
            best_weights = {k: v.clone() for k, v in model.state_dict().items()}
        print(
            f"epoch {epoch + 1:3d}/{epochs}  train {total / len(rows):.3f}  "
            f"held out {held:.3f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    model.load_state_dict(best_weights)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "tiny")
    parser.add_argument("--stories", type=integer(HELD_OUT + 1), default=3000)
    parser.add_argument("--epochs", type=integer(1), default=2)
    parser.add_argument("--batch", type=integer(1), default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=integer(0), default=0)
    parser.add_argument("--threads", type=integer(1), default=os.cpu_count())
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    stories = compose(args.stories, args.seed)
    tokenizer = train_tokenizer(stories)
    eos = tokenizer.token_to_id(EOS)
    rows = [[*tokenizer.encode(story).ids, eos] for story in stories]
    model = make_model(tokenizer)
    print(
        f"{len(stories)} stories, {sum(map(len, rows))} tokens, "
        f"{sum(p.numel() for p in model.parameters())} parameters",
        flush=True,
    )
    train(model, rows[HELD_OUT:], rows[:HELD_OUT], args.epochs, args.batch, args.lr)

    args.out.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos
    )
    model.save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"wrote {args.out}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
