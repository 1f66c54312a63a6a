"""Options and inputs of the training programs: each is followed or refused, in a line,
before weights load, and nothing is written of what is no number."""

import pytest
import torch
import torch_xla
from safetensors.torch import load_file, save_file

import finetune_lora
import train_tiny
import training
from checkpoints import edit_config, edit_json, tiny_checkpoint
from command import command_error
from config import ModelConfig

TEXT = "Pip the mouse went home.\n\nOtto the owl slept.\n"


@pytest.fixture(autouse=True)
def _grad_mode():
    torch_xla.device()  # before the first backward of the process
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def inputs(checkpoint, tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT)
    return {"--model": checkpoint, "--text": text, "--out": tmp_path / "out"}


def refused(inputs, **changes) -> str:
    given = inputs | {f"--{name}": value for name, value in changes.items()}
    arguments = [part for pair in given.items() for part in pair]
    return command_error(*arguments, main=finetune_lora.main)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e999", "x", ""])
@pytest.mark.parametrize("option", ["lr", "scale"])
def test_numbers(inputs, option, value):
    said = refused(inputs, **{option: value})
    assert said.startswith(
        f"argument --{option}: must be a number above 0, got '{value}'"
    )
    if option == "lr":
        said = command_error("--lr", value, "--out", "x", main=train_tiny.main)
        assert said.startswith("argument --lr: must be a number above 0, got")


@pytest.mark.parametrize(
    "option, value",
    [("rank", 0), ("epochs", 0), ("tokens", 15), ("seed", -1), ("seed", 2**63)],
)
def test_integers(inputs, option, value):
    said = refused(inputs, **{option: value})
    assert said.startswith(f"argument --{option}: must be an integer of at ")


def test_a_rank_beyond_the_matrices(inputs):
    assert refused(inputs, rank=33).startswith("--rank must be at most 32, ")


def test_the_folder_to_write(inputs, tmp_path):
    """Looked at before the training, not behind it."""
    same = refused(inputs, out=inputs["--model"])
    assert same.startswith("--out must be another folder than the input, got ")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        said = refused(inputs, out=out)
        assert said.startswith(f"--out must be a folder that can be made, got {out}: ")
        said = command_error("--out", out, main=train_tiny.main)
        assert said.startswith(f"--out must be a folder that can be made, got {out}: ")


def test_texts_that_cannot_be_read(inputs, tmp_path):
    gone = tmp_path / "gone"
    for text in (gone, tmp_path):
        said = refused(inputs, text=text)
        assert said.startswith(f"--text must be a file that can be read, got {text}: ")
    (tmp_path / "latin").write_bytes(b"Pip \xe9tait l\xe0")
    said = refused(inputs, text=tmp_path / "latin")
    assert said.startswith(f"--text must be in UTF-8, got {tmp_path / 'latin'} with ")
    assert said.endswith(" at byte 4")


@pytest.mark.parametrize("text", ["", " \n\n \n"])
def test_texts_of_nothing(inputs, tmp_path, text):
    (tmp_path / "text").write_text(text)
    said = refused(inputs)
    assert said == "--text must have a text of at least 2 tokens, got 0 shorter"


def test_texts_of_one_token_are_left_out(tmp_path):
    """Their loss would be of no label, which is no number."""
    folder = tiny_checkpoint(tmp_path, eos_token_id=None)
    edit_json(folder / "tokenizer.json", post_processor=None)
    edit_json(folder / "generation_config.json", eos_token_id=...)
    config = ModelConfig.from_folder(folder)
    tokenizer = finetune_lora.tokenizers.load(folder)
    rows = finetune_lora.rows_of("a\n\nPip the mouse\n\nb", tokenizer, config, 64)
    assert len(rows) == 1 and len(rows[0]) > 1
    with pytest.raises(ValueError, match="at least 2 tokens, got 2 shorter"):
        finetune_lora.rows_of("a\n\nb", tokenizer, config, 64)


def test_texts_that_are_cut_are_told(checkpoint, capsys):
    config = ModelConfig.from_folder(checkpoint)
    tokenizer = finetune_lora.tokenizers.load(checkpoint)
    rows = finetune_lora.rows_of(TEXT + "\n" + "a " * 99, tokenizer, config, 20)
    assert max(map(len, rows)) == 20
    assert capsys.readouterr().err == "warning: 1 of 3 texts are cut to 20 tokens\n"


def test_a_tokenizer_of_another_model(inputs, tmp_path):
    """An embedding on XLA takes any number for a token, without a word."""
    folder = tiny_checkpoint(tmp_path / "small", vocab_size=300)
    said = refused(inputs, model=folder)
    assert said.startswith("finetune_lora: tokens must be in 0..299, got ")
    assert said.endswith("is tokenizer.json that of this model?")


def test_checkpoints_are_looked_at_first(inputs, tmp_path):
    said = refused(inputs, model=tmp_path / "gone")
    assert said.startswith("model: must be the folder of a checkpoint, got ")
    folder = tiny_checkpoint(tmp_path / "other")
    edit_config(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert "rope_type must be one of" in refused(inputs, model=folder)
    folder = tiny_checkpoint(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/x")
    assert "got a Git LFS pointer" in refused(inputs, model=folder)


def test_weights_that_are_no_numbers(checkpoint, inputs, tmp_path):
    folder = tiny_checkpoint(tmp_path / "nan")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    given = inputs | {"--model": folder, "--tokens": 64}
    with pytest.raises(SystemExit) as info:
        finetune_lora.main([str(part) for pair in given.items() for part in pair])
    assert info.value.code == 2
    assert not any(inputs["--out"].iterdir())


def test_a_loss_that_is_no_number_is_an_error(monkeypatch):
    parameter, losses = torch.nn.Parameter(torch.zeros(1)), iter([1.0, float("nan")])
    monkeypatch.setattr(
        training, "loss_of", lambda decoder, batch: parameter.sum() + next(losses)
    )
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    step = training.pack([[1, 2]], 16, 1)
    with pytest.raises(ValueError, match="got nan at step 2: lower --lr"):
        training.train(None, [parameter], [step, step], optimizer)
