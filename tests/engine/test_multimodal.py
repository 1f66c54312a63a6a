"""Models that take images, of text alone: answers are transformers', images refused."""

import json

import pytest
import torch
import transformers
from PIL import Image
from vllm import SamplingParams

import vllm_checkpoints
import vllm_session
from vllm_checkpoints import VOCABULARY
from vllm_in_process import engine, generate, greedy, steady, tokens
from vllm_oracle import Oracle, assert_greedy

# Below the tokens that stand for images.
PROMPTS = [[(11 * i + 3) % 256 + 64 for i in range(n)] for n in (20, 37, 100)]
IMAGE = VOCABULARY - 4


def gemma3():
    config = transformers.Gemma3Config(
        text_config=vllm_checkpoints.config("gemma3").to_dict(),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=1,
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
    )
    processor = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return config, transformers.Gemma3ForConditionalGeneration, processor


def qwen2_vl():
    """Whose tokens have three positions."""
    config = transformers.Qwen2VLConfig(
        text_config=vllm_checkpoints.SIZES
        | dict(
            rope_theta=10000.0,
            rope_scaling={"rope_type": "default", "mrope_section": [4, 6, 6]},
        ),
        vision_config=dict(
            depth=1, embed_dim=32, hidden_size=128, num_heads=2, mlp_ratio=2
        ),
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    processor = transformers.Qwen2VLImageProcessor()
    return config, transformers.Qwen2VLForConditionalGeneration, processor


class TextOracle(Oracle):
    def __init__(self, model):
        self.model = model.double().eval()


@pytest.mark.parametrize("family", [gemma3, qwen2_vl])
def test_text_alone(family):
    config, kind, processor = family()
    folder = vllm_session.FOLDER / f"{family.__name__}_images"
    torch.manual_seed(0)
    model = vllm_checkpoints.save_model(kind._from_config(config), folder)
    processor.save_pretrained(folder)
    file = folder / "config.json"  # transformers leaves it out for some
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"architectures": [kind.__name__]})
    )
    oracle = TextOracle(model)
    with engine(folder) as llm, steady(llm):
        for _ in range(2):
            answers = tokens(generate(llm, PROMPTS, greedy(8)))
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                assert_greedy(oracle, prompt, answer)
        image = Image.new("RGB", (28, 28))
        prompt = {
            "prompt_token_ids": [70, IMAGE, 71],
            "multi_modal_data": {"image": image},
        }
        with pytest.raises(ValueError, match="(?i)at most 0 image"):
            llm.generate([prompt], SamplingParams(max_tokens=2), use_tqdm=False)
        (answer,) = tokens(generate(llm, PROMPTS[:1], greedy(8)))
        assert_greedy(oracle, PROMPTS[0], answer)
