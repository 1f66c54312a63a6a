"""Loads the weights of a Hugging Face checkpoint folder into a Decoder.

SPDX-License-Identifier: Apache-2.0

Takes safetensors, in one file or in several with an index. Every weight must
be there, have its shape, and be used: a checkpoint of another model fails
here, by name, and not as strange text later.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from config import ModelConfig
from model import PACKED, Decoder

# Stored by old checkpoints, but computed from the config.
DERIVED = "rotary_emb.inv_freq"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by the index where there is one."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif single.exists():
        names = [single.name]
    else:
        raise FileNotFoundError(
            "model: folder must hold model.safetensors or "
            f"model.safetensors.index.json, got {folder}"
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"model: folder must hold every file of its index, got {folder} "
            f"without {', '.join(missing)}"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def load(
    folder: str | Path,
    config: ModelConfig,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: str = "all",
) -> Decoder:
    """Builds the decoder and fills it.

    Args:
      folder: the checkpoint.
      config: ModelConfig.from_folder(folder).
      max_len: longest sequence to be able to run.
      dtype: to compute in; stored weights are converted.
      device: to put the weights on.
      ops: the Decoder's.

    Raises:
      FileNotFoundError: there are no weights, or a file of the index is gone.
      ValueError: a weight is missing, unknown, or of another shape.
    """
    with torch.device("meta"):  # no memory until a weight arrives
        decoder = Decoder(config, max_len, ops)
    wanted = _unpacked(decoder.state_dict())
    weights = {}
    for name, tensor in stored_tensors(Path(folder)):
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if tied or name.endswith(DERIVED):
            continue
        if name not in wanted:
            raise ValueError(f"model: weights must be known, got {name} in {folder}")
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"model: {name} must have shape {tuple(wanted[name].shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        weights[name] = tensor.to(dtype)
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise ValueError(
            f"model: weights must be complete, got {folder} without "
            f"{len(missing)} of {len(wanted)}, {missing[0]} first"
        )
    decoder.load_state_dict(_packed(weights), assign=True)
    decoder.cos_sin_cache = decoder.cos_sin_cache.to(dtype)
    return decoder.requires_grad_(False).eval().to(device)


def _unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names tensors as checkpoints do, and takes packed ones apart."""
    found = {}
    for name, tensor in tensors.items():
        *path, module, kind = name.split(".")
        parts = PACKED.get(module, (module,))
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            found[".".join((*path, part, kind))] = rows
    return found


def _packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite of `_unpacked`."""
    whole = {parts[0]: (name, parts) for name, parts in PACKED.items()}
    rest = {part for parts in PACKED.values() for part in parts[1:]}
    found = {}
    for name, tensor in tensors.items():
        *path, module, kind = name.split(".")
        if module in whole:
            module, parts = whole[module]
            tensor = torch.cat([tensors[".".join((*path, p, kind))] for p in parts])
        elif module in rest:
            continue
        found[".".join((*path, module, kind))] = tensor
    return found
