"""Loads the tokenizer of a checkpoint folder.

SPDX-License-Identifier: Apache-2.0

tokenizer.json holds more than a tokenizer: how training padded and cut its texts is
stored there too, and the library applies it to every text from then on. A prompt has
to go in as it is, so those settings are turned off, as transformers does for each call.
"""

from pathlib import Path

from tokenizers import Tokenizer

from files import broken, check_file, is_there, missing, short


def load(folder: str | Path) -> Tokenizer:
    """Reads tokenizer.json.

    What it adds to a text, such as a token that begins it, stays.

    Raises:
      CheckpointError: there is none, or it is broken.
    """
    path = Path(folder) / "tokenizer.json"
    if not is_there(path):
        convert = (
            "make one by `python -c 'from transformers import AutoTokenizer; "
            f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")\'`'
        )
        fixes = dict.fromkeys(("tokenizer.model", "vocab.json", "tekken.json"), convert)
        raise missing(path.parent, path.name, fixes, "download it, too")
    check_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode("a")  # some parts are looked at when they are used
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is no Exception
        raise broken(path, "a tokenizer", f"something else ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):  # random merges, for training
        tokenizer.model.dropout = None
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a prompt.

    Raises:
      ValueError: the tokenizer cannot take the text, or the text is not valid Unicode,
        as bytes of another encoding on the command line are not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"generate: prompt must be UTF-8, got {short(text)}"
        ) from error
    try:
        return tokenizer.encode(text).ids
    except Exception as error:  # such as a character that no token stands for
        raise ValueError(
            "generate: prompt must be text that tokenizer.json takes, got "
            f"{short(text)}: {error}"
        ) from error
