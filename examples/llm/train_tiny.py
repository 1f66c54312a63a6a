"""Trains the small Llama checkpoint that the demo runs by default.

SPDX-License-Identifier: Apache-2.0

    python examples/llm/train_tiny.py --out DIR [--device gpu]

Trains a byte-level BPE tokenizer and a Llama of 1.7 million parameters on the
stories of stories.py, and writes a Hugging Face checkpoint folder of less than
4 MB, with a picture of the loss. Nothing is downloaded. It trains on XLA, CPU or GPU,
by the ops of this project and their gradients (training.py).

The shape is chosen to exercise the demo, not to be the best model of its size:
eight layers (so sixteen caches must stay in place), grouped-query attention,
and head_dim 64, the smallest that paged attention takes.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from config import ModelConfig
from model import Decoder
from options import Parser, check_out, errors_as_lines, integer, positive
from stories import compose
from training import batches, mean_loss, plot, start_xla, train
from weights import HEAD, packed, unpacked

HERE = Path(__file__).resolve().parent
BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 768
HELD_OUT = 48  # stories that are kept for validation


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


def decoder_of(model: LlamaForCausalLM, device: torch.device) -> Decoder:
    """The same weights in the example's decoder, float32, to be trained."""
    config = ModelConfig.from_dict(model.config.to_dict())
    decoder = Decoder(config, config.max_len)
    tied = config.tie_word_embeddings
    named = {k: v for k, v in model.state_dict().items() if not (tied and k == HEAD)}
    decoder.load_state_dict(packed(named))
    return decoder.to(device)


def optimizer_of(decoder: Decoder, peak_lr: float, steps: int):
    """AdamW with a short warm-up and a cosine."""
    decay = [p for p in decoder.parameters() if p.dim() > 1]
    rest = [p for p in decoder.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.98),
    )
    warmup = min(50, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(
            (s + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * s / steps)
        ),
    )
    return optimizer, schedule


def fit(decoder: Decoder, rows, held_out, args) -> list[float]:
    """Trains, keeps the best weights seen, and returns the loss of each step."""
    sizes = (args.tokens, args.tokens // 16)
    epochs = [list(batches(rows, *sizes)) for _ in range(args.epochs)]
    total = sum(map(len, epochs))
    optimizer, schedule = optimizer_of(decoder, args.lr, total)
    best, best_weights, losses = math.inf, {}, []
    with tqdm(total=total, unit="step", disable=None) as bar:

        def report(loss: torch.Tensor) -> None:
            bar.update()
            if bar.n % 10 == 0:  # its value is waited for
                bar.set_postfix(loss=f"{loss.item():.3f}")

        for epoch, steps in enumerate(epochs):
            losses += train(
                decoder, decoder.parameters(), steps, optimizer, schedule, report
            )
            held = mean_loss(decoder, batches(held_out, *sizes, shuffle=False))
            if held < best:
                best = held
                best_weights = {
                    k: v.detach().clone() for k, v in decoder.state_dict().items()
                }
            recent = losses[-len(steps) :]
            bar.write(
                f"epoch {epoch + 1:3d}/{args.epochs}  train "
                f"{sum(recent) / len(recent):.3f}  held out {held:.3f}"
            )
    decoder.load_state_dict(best_weights)
    return losses


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--stories", type=integer(HELD_OUT + 1), default=3000)
    parser.add_argument("--epochs", type=integer(1), default=2)
    parser.add_argument("--tokens", type=integer(256), default=1024, help="of a step")
    parser.add_argument("--lr", type=positive, default=2e-3)
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0)
    args = parser.parse_args(argv)
    with errors_as_lines("lower --tokens"):
        run(args)


def run(args: argparse.Namespace) -> None:
    check_out(args.out)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
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
    decoder = decoder_of(model, start_xla(args.device))
    losses = fit(decoder, rows[HELD_OUT:], rows[:HELD_OUT], args)

    plot(losses, args.out / "loss.png")
    trained = {name: t.cpu() for name, t in unpacked(decoder.state_dict()).items()}
    model.load_state_dict(trained, strict=False)
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
