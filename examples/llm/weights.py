"""Loads the weights of a Hugging Face checkpoint folder into a Decoder.

SPDX-License-Identifier: Apache-2.0

Takes safetensors, in one file or in several with an index. Every weight must
be there, have its shape, and be used: a checkpoint of another model fails
here, by name, and not as strange text later. Names, shapes and types stand in
the files' headers, so all of that is known before a weight is read (`check`).
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from config import ModelConfig
from files import (
    CheckpointError,
    CheckpointWarning,
    broken,
    check_file,
    first_few,
    is_there,
    missing,
    read_json,
)
from model import PACKED, Decoder
from parallel import OneDevice

# Stored by old checkpoints, but computed from the config.
DERIVED = "rotary_emb.inv_freq"
DTYPES = ("F64", "F32", "F16", "BF16")  # others are quantised, or no weights
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it


# --- Files. -------------------------------------------------------------------
def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those of its index."""
    single = folder / "model.safetensors"
    if is_there(single):  # first, as transformers has it
        return [single]
    index = folder / "model.safetensors.index.json"
    if not is_there(index):
        convert = (
            "convert it by `python -c 'from transformers import AutoModelForCausalLM; "
            f'AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")'
            f'.save_pretrained("{folder}")\'`'
        )
        fixes = {
            "model-*.safetensors": f"download {index.name}, too",
            "pytorch_model*.bin*": convert,
            "*.gguf": "GGUF files are not read, take the checkpoint in safetensors",
        }
        raise missing(
            folder, f"{single.name} or {index.name}", fixes, "download it, too"
        )
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    # Names alone: an index that was downloaded has no business in other folders.
    if not files or not all(
        isinstance(name, str) and name and Path(name).name == name for name in files
    ):
        raise CheckpointError(
            f"model: {index} must hold a weight_map from weights to names of files: "
            "download it again"
        )
    names = sorted(set(files))
    gone = [name for name in names if not is_there(folder / name)]
    if gone:
        raise CheckpointError(
            f"model: folder must hold every file of {index.name}, got {folder} without "
            f"{first_few(gone)} ({len(gone)} of {len(names)}): download them, too"
        )
    return [folder / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise broken(path, "a safetensors file", _why(path, error)) from error


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that begins as a safetensors file does, or not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = file.read(header_size) if header_size < size else b""
    try:
        ends = [entry["data_offsets"][1] for entry in json.loads(header).values()
                if "data_offsets" in entry]  # fmt: skip
        whole = 8 + header_size + max(ends)
    except (ValueError, TypeError, LookupError, AttributeError):
        return f"{size} bytes of something else ({error})"
    if size == whole:
        return f"a broken header ({error})"
    return f"{size} bytes where its header says {whole}"


# --- Which tensors there are, and which there must be. ------------------------
def check(folder: str | Path, config: ModelConfig) -> dict[str, list[Stored]]:
    """Compares the headers of a checkpoint's files with what the config needs.

    Returns:
      Where each weight is stored, by name: more than once, if several files have it.
      Of the embedding and the head of a tied model one may be absent.

    Raises:
      CheckpointError: a file is gone or broken; a weight is missing, unknown, of
        another shape or of a type that no weight has.
    """
    stored: dict[str, list[Stored]] = {}
    paths = weight_files(Path(folder))
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (no dict, and not iterable)
                if name.endswith(DERIVED):
                    continue
                part = file.get_slice(name)
                where = Stored(path, tuple(part.get_shape()), part.get_dtype())
                stored.setdefault(name, []).append(where)
    with torch.device("meta"):
        wanted = unpacked(Decoder(config, max_len=1).state_dict())
    if config.tie_word_embeddings and HEAD in stored:
        wanted[HEAD] = wanted[EMBEDDING]
    if config.tie_word_embeddings and EMBEDDING not in stored and HEAD in stored:
        del wanted[EMBEDDING]
    unknown = sorted(stored.keys() - wanted.keys())
    lacking = sorted(wanted.keys() - stored.keys())
    if unknown or lacking:
        raise CheckpointError(
            f"model: {_files(folder, paths)} must hold the {len(wanted)} weights of "
            "config.json, got " + _difference(unknown, lacking)
        )
    for name, places in stored.items():
        for path, shape, dtype in places:
            must = f"model: {name} in {path} must"
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{must} have one of the types {', '.join(DTYPES)}, got {dtype}: "
                    "quantised checkpoints are not read"
                )
            expected = tuple(wanted[name].shape)
            if shape != expected:
                raise CheckpointError(
                    f"{must} have shape {expected} by config.json, got {shape}"
                )
    return stored


def _files(folder, paths: list[Path]) -> str:
    if len(paths) == 1:
        return str(paths[0])
    return f"the {len(paths)} files of the index in {folder}"


def _difference(unknown: list[str], lacking: list[str]) -> str:
    parts = [
        f"{len(names)} that are {what} ({first_few(names)})"
        for names, what in ((lacking, "missing"), (unknown, "unknown"))
        if names
    ]
    return " and ".join(parts) + _hint(unknown, lacking)


def _hint(unknown: list[str], lacking: list[str]) -> str:
    """What such a difference mostly comes from."""
    parts = {part for name in unknown for part in name.split(".")}
    if parts & {"qweight", "qzeros", "scales", "weight_scale", "weight_scale_inv",
                "weight_packed", "absmax", "quant_map"}:  # fmt: skip
        return ": quantised checkpoints are not read"
    if lacking == [HEAD] and not unknown:
        return (
            ": if the head is the embedding, as in many small models, write "
            "tie_word_embeddings true into config.json"
        )
    if not lacking and all(name.endswith(".bias") for name in unknown):
        return ": attention_bias and mlp_bias of config.json ask for none"
    if not unknown and all(name.endswith(".bias") for name in lacking):
        return ": attention_bias and mlp_bias of config.json ask for them"
    if any(f"model.{name}" in lacking for name in unknown):
        return ": save it with its head, as transformers' AutoModelForCausalLM does"
    return ""


# --- Loading. -----------------------------------------------------------------
def load(
    folder: str | Path,
    config: ModelConfig,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: str = "all",
    parallel: OneDevice | None = None,
) -> Decoder:
    """Builds the decoder and fills it.

    Args:
      folder: the checkpoint.
      config: ModelConfig.from_folder(folder).
      max_len: longest sequence to be able to run.
      dtype: to compute in; stored weights are converted.
      device: to put the weights on.
      ops: the Decoder's.
      parallel: how the weights lie on several devices; default: on one.

    Raises:
      CheckpointError: `check` does, before anything is read; or a weight is stored
        twice with different values, or too large for `dtype`.
    """
    parallel = parallel or OneDevice()
    stored = check(folder, config)
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(Path(folder)):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name not in stored:
                    continue
                weight = _converted(file.get_tensor(name), dtype, name)
                weight = parallel.part_of_weight(name, weight, config)
                if name in weights and not torch.equal(weight, weights[name]):
                    places = " and ".join(str(where.path) for where in stored[name])
                    raise CheckpointError(
                        f"model: {name} must have one value, got two: {places}"
                    )
                weights[name] = weight
    if config.tie_word_embeddings:
        config = _tie(weights, config)
    return assemble(weights, config, max_len, dtype, device, ops, parallel)


def assemble(
    weights: dict[str, torch.Tensor],
    config: ModelConfig,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: str = "all",
    parallel: OneDevice | None = None,
) -> Decoder:
    """Builds the decoder of weights in memory; as `load`.

    Args:
      weights: by their names in a checkpoint, of `dtype`: this process's parts.
    """
    parallel = parallel or OneDevice()
    with torch.device("meta"):
        decoder = Decoder(parallel.part_of_config(config), max_len, ops)
    # A token is one of the whole vocabulary.
    decoder.config = dataclasses.replace(decoder.config, vocab_size=config.vocab_size)
    decoder.load_state_dict(packed(weights), assign=True)
    decoder.cos_sin_cache = decoder.cos_sin_cache.to(dtype)
    decoder.requires_grad_(False).eval()
    return parallel.place(decoder, device)


def _converted(weight: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    converted = weight.to(dtype)
    narrower = dtype == torch.float16 and weight.dtype != dtype
    if narrower and converted.isinf().any() and not weight.isinf().any():
        raise CheckpointError(
            f"model: {name} must be at most 65504 to be float16, got "
            f"{weight.abs().max().item():g}: take bfloat16 or float32"
        )
    return converted


def _tie(weights: dict[str, torch.Tensor], config: ModelConfig) -> ModelConfig:
    """Leaves one tensor of a tied embedding and head, unless they differ.

    A config may say that they are one and the checkpoint hold two. What was stored
    is what was trained, so it counts, as in transformers.
    """
    head = weights.get(HEAD)
    if head is None:
        return config
    if EMBEDDING in weights and not torch.equal(head, weights[EMBEDDING]):
        warnings.warn(
            f"model: {HEAD} and {EMBEDDING} are stored with different values, so the "
            "head is not tied to the embedding, although tie_word_embeddings in "
            "config.json is true; false says the same without this warning",
            CheckpointWarning,
            stacklevel=3,
        )
        return dataclasses.replace(config, tie_word_embeddings=False)
    weights[EMBEDDING] = weights.pop(HEAD)
    return config


def unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names tensors as checkpoints do, and takes packed ones apart."""
    found = {}
    for name, tensor in tensors.items():
        *path, module, kind = name.split(".")
        parts = PACKED.get(module, (module,))
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            found[".".join((*path, part, kind))] = rows
    return found


def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite of `unpacked`.

    Takes them out of `tensors`, so that the host holds no more than one of them twice.
    """
    whole = {parts[0]: (name, parts) for name, parts in PACKED.items()}
    rest = {part for parts in PACKED.values() for part in parts[1:]}
    found = {}
    for name in list(tensors):
        *path, module, kind = name.split(".")
        if module in rest:
            continue
        tensor = tensors.pop(name)
        if module in whole:
            module, parts = whole[module]
            others = [tensors.pop(".".join((*path, p, kind))) for p in parts[1:]]
            tensor = torch.cat([tensor, *others])
            del others
        found[".".join((*path, module, kind))] = tensor
    return found
