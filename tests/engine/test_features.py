"""What a request can ask of vLLM, each held to transformers, sync and async.

Greedy answers under penalties, biases, grammars and the like must be, token by token,
what the same change of transformers' logits makes the most likely one.
"""

import itertools
import json
import math
from collections import Counter

import pytest
import regex
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

import vllm_session
from vllm_checkpoints import EOS, OTHER, PROMPT, VOCABULARY
from vllm_in_process import OPTIONS, engine, generate, greedy, metric, steady, tokens
from vllm_oracle import assert_greedy
from vllm_session import MODES

FAMILY = "llama"
ANSWER = 16


@pytest.fixture(scope="module")
def checkpoint():
    return vllm_session.checkpoint(FAMILY)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return vllm_session.oracle(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module", params=MODES)
def running(request, checkpoint):
    with engine(checkpoint, **MODES[request.param]) as llm:
        scheduler = llm.llm_engine.vllm_config.scheduler_config
        assert scheduler.async_scheduling == (request.param == "async")
        yield llm


@pytest.fixture
def llm(running):
    with steady(running):
        yield running


def answer_of(llm, params, prompt=PROMPT) -> list[int]:
    return tokens(generate(llm, [prompt], params))[0]


def plain(oracle, prompt=PROMPT) -> list[int]:
    return oracle.greedy(prompt, ANSWER)


@pytest.fixture(scope="module")
def repeating(oracle) -> list[int]:
    """A prompt whose greedy answer has a token twice: penalties change it."""
    prompts = ([(7 * i + 31 * k) % 256 + 64 for i in range(20)] for k in range(200))
    return next(p for p in prompts if len(set(plain(oracle, p))) < ANSWER)


# --- What changes the logits --------------------------------------------------


def test_presence_and_frequency_penalty(llm, oracle, repeating):
    def change(logits, before):
        for token, count in Counter(before).items():
            logits[token] -= 1.5 + 0.5 * count
        return logits

    params = greedy(ANSWER, presence_penalty=1.5, frequency_penalty=0.5)
    answer = answer_of(llm, params, repeating)
    assert_greedy(oracle, repeating, answer, change)
    assert answer != plain(oracle, repeating)


def test_repetition_penalty(llm, oracle, repeating):
    def change(logits, before):
        for token in set(repeating) | set(before):
            logits[token] *= 1 / 1.8 if logits[token] > 0 else 1.8
        return logits

    params = greedy(ANSWER, repetition_penalty=1.8)
    answer = answer_of(llm, params, repeating)
    assert_greedy(oracle, repeating, answer, change)
    assert answer != plain(oracle, repeating)


def test_logit_bias(llm, oracle):
    bias = {5: 4.0, 77: 3.0, plain(oracle)[0]: -20.0}

    def change(logits, before):
        for token, value in bias.items():
            logits[token] += value
        return logits

    answer = answer_of(llm, greedy(ANSWER, logit_bias=bias))
    assert_greedy(oracle, PROMPT, answer, change)


def test_allowed_token_ids(llm, oracle):
    allowed = list(range(100, 140))

    def change(logits, before):
        rest = torch.full_like(logits, -math.inf)
        rest[allowed] = logits[allowed]
        return rest

    answer = answer_of(llm, greedy(ANSWER, allowed_token_ids=allowed))
    assert set(answer) <= set(allowed)
    assert_greedy(oracle, PROMPT, answer, change)


def test_allowed_token_ids_of_others(llm, oracle):
    """They stay with their request when it takes another's row."""
    runner = llm.llm_engine
    allowed = greedy(3 * ANSWER, allowed_token_ids=list(range(100, 140)))
    for name, params in dict(first=greedy(2), second=allowed).items():
        runner.add_request(name, {"prompt_token_ids": PROMPT}, params)
    answers = {}
    while runner.has_unfinished_requests():
        for output in runner.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
            if output.request_id == "first" and output.finished:
                finished = len(answers["second"])
        if len(answers.get("second", ())) > 6 and "third" not in answers:
            answers["third"] = []
            runner.add_request("third", {"prompt_token_ids": OTHER}, greedy(ANSWER))
    assert finished < 6  # so that the second has moved before the third came
    assert len(answers["second"]) == 3 * ANSWER
    assert_greedy(oracle, OTHER, answers["third"])


def test_bad_words(llm, oracle, tokenizer):
    """A word of one token never comes, one of two only in parts."""

    def is_word(*ids):
        text = tokenizer.decode(ids)
        return text == text.strip() and tokenizer.encode(text) == list(ids)

    usual = oracle.greedy(PROMPT, 3 * ANSWER)
    first = next(token for token in usual if is_word(token))
    pair = next(
        (one, two)
        for one, two in itertools.pairwise(usual)
        if first not in (one, two) and is_word(one, two)
    )
    # vLLM forbids a word after a space as well, where that has as many tokens.
    words = [[first], list(pair)]
    words += [tokenizer.encode(" " + tokenizer.decode(word)) for word in words]
    banned = [
        w for w, like in zip(words, words[:2] * 2, strict=True) if len(w) == len(like)
    ]

    def change(logits, before):
        for *start, last in banned:
            if before[len(before) - len(start) :] == start:
                logits[last] = -math.inf
        return logits

    bad_words = [tokenizer.decode(word) for word in words[:2]]
    answer = answer_of(llm, greedy(3 * ANSWER, bad_words=bad_words))
    assert first in usual and first not in answer
    assert_greedy(oracle, PROMPT, answer, change)


def test_min_tokens(llm, oracle):
    """No token that stops comes before the tenth, and one that comes then stops."""
    stops = list(range(0, VOCABULARY, 3))

    def change(logits, before):
        if len(before) < 10:
            logits[[EOS, *stops]] = -math.inf
        return logits

    params = SamplingParams(
        temperature=0.0, max_tokens=64, min_tokens=10, stop_token_ids=stops
    )
    (output,) = generate(llm, [PROMPT], params)
    answer = list(output.outputs[0].token_ids)
    assert_greedy(oracle, PROMPT, answer, change)
    assert 10 < len(answer) < 64
    assert answer[-1] in stops and not set(answer[:-1]) & set(stops)
    assert output.outputs[0].finish_reason == "stop"


# --- What ends an answer ------------------------------------------------------


def test_end_of_text(llm, oracle):
    params = SamplingParams(temperature=0.0, max_tokens=8, logit_bias={EOS: 50.0})
    (output,) = generate(llm, [PROMPT], params)
    assert list(output.outputs[0].token_ids) == [EOS]
    assert output.outputs[0].finish_reason == "stop"


def test_stop_string(llm, oracle, tokenizer):
    answer = oracle.greedy(PROMPT, ANSWER)
    text = tokenizer.decode(answer)
    stop = text[len(text) // 2 :][:3]
    params = greedy(ANSWER, stop=[stop])
    (output,) = generate(llm, [PROMPT], params)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].stop_reason == stop
    params.include_stop_str_in_output = True
    (output,) = generate(llm, [PROMPT], params)
    assert output.outputs[0].text == text[: text.index(stop)] + stop


# --- Structured output --------------------------------------------------------


def grammar_change(tokenizer, pattern):
    """Leaves the tokens after which the text may still match, as a grammar does."""
    texts = [tokenizer.decode([token]) for token in range(VOCABULARY)]

    def change(logits, before):
        text = tokenizer.decode(before)
        for token, more in enumerate(texts):
            fits = more and regex.fullmatch(pattern, text + more, partial=True)
            if token < 5 or not fits:
                logits[token] = -math.inf
        return logits

    return change


def assert_matches(llm, oracle, tokenizer, pattern, asked):
    params = SamplingParams(temperature=0.0, max_tokens=64, structured_outputs=asked)
    (output,) = generate(llm, [PROMPT], params)
    text = output.outputs[0].text
    assert regex.fullmatch(pattern, text), text
    answer = [t for t in output.outputs[0].token_ids if t != EOS]
    assert_greedy(oracle, PROMPT, answer, grammar_change(tokenizer, pattern))


def test_structured_choice(llm, oracle, tokenizer):
    asked = StructuredOutputsParams(choice=["yes", "no", "the answer is 7"])
    assert_matches(llm, oracle, tokenizer, "yes|no|the answer is 7", asked)


def test_structured_regex(llm, oracle, tokenizer):
    pattern = r"[a-c]{3}-[0-9]{2}x"
    asked = StructuredOutputsParams(regex=pattern)
    assert_matches(llm, oracle, tokenizer, pattern, asked)


def test_structured_json(llm):
    schema = dict(
        type="object",
        properties=dict(
            name=dict(type="string", enum=["ann", "bob"]),
            age=dict(type="integer", enum=[1, 2, 30]),
        ),
        required=["name", "age"],
        additionalProperties=False,
    )
    asked = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    params = SamplingParams(temperature=0.0, max_tokens=64, structured_outputs=asked)
    (output,) = generate(llm, [PROMPT], params)
    value = json.loads(output.outputs[0].text)
    assert value["name"] in ("ann", "bob") and value["age"] in (1, 2, 30)


# --- Sampling -----------------------------------------------------------------

SAMPLES = 400


def sampled(llm, **options) -> Counter:
    """How often each token came first, of SAMPLES answers of one token."""
    params = SamplingParams(n=SAMPLES, max_tokens=1, seed=3, **options)
    (output,) = generate(llm, [PROMPT], params)
    assert len(output.outputs) == SAMPLES
    return Counter(answer.token_ids[0] for answer in output.outputs)


def assert_drawn_from(counts: Counter, probabilities: torch.Tensor) -> None:
    """No token that cannot come, and the others about as often as they should."""
    assert all(probabilities[token] > 0 for token in counts)
    # Pearson's statistic, over tokens that are expected five times at least, the rest
    # as one: its mean is the number of classes less one, its deviation the root of
    # twice that.
    expected = probabilities * SAMPLES
    common = expected >= 5
    got = torch.tensor([float(counts[token]) for token in range(len(expected))])
    pairs = [*zip(got[common], expected[common], strict=True)]
    if (rest := expected[~common].sum()) > 5:
        pairs.append((got[~common].sum(), rest))
    statistic = sum((g - e) ** 2 / e for g, e in pairs)
    freedom = len(pairs) - 1
    assert freedom > 0
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def first_probabilities(oracle, temperature=1.0) -> torch.Tensor:
    return torch.softmax(oracle.logits(PROMPT)[-1] / temperature, dim=-1)


def test_temperature(llm, oracle):
    counts = sampled(llm, temperature=1.5)
    assert_drawn_from(counts, first_probabilities(oracle, 1.5))


def test_top_k(llm, oracle):
    probabilities = first_probabilities(oracle, 1.2)
    kept = probabilities.topk(6)
    expected = torch.zeros_like(probabilities)
    expected[kept.indices] = kept.values / kept.values.sum()
    assert_drawn_from(sampled(llm, temperature=1.2, top_k=6), expected)


def test_top_p(llm, oracle):
    probabilities = first_probabilities(oracle, 1.2)
    values, order = probabilities.sort(descending=True)
    values[values.cumsum(0) - values >= 0.7] = 0.0
    expected = torch.zeros_like(probabilities)
    expected[order] = values / values.sum()
    assert_drawn_from(sampled(llm, temperature=1.2, top_p=0.7), expected)


def test_min_p(llm, oracle):
    probabilities = first_probabilities(oracle, 1.2)
    probabilities[probabilities < 0.2 * probabilities.max()] = 0.0
    expected = probabilities / probabilities.sum()
    assert_drawn_from(sampled(llm, temperature=1.2, min_p=0.2), expected)


def test_top_k_of_one_is_greedy(llm, oracle):
    params = SamplingParams(top_k=1, max_tokens=ANSWER, ignore_eos=True)
    assert answer_of(llm, params) == plain(oracle)


def test_seed(llm):
    """A seed gives the same answer each time, alone and in any company."""

    def params(seed):
        return SamplingParams(seed=seed, max_tokens=ANSWER, ignore_eos=True)

    alone = answer_of(llm, params(1))
    assert answer_of(llm, params(1)) == alone
    assert answer_of(llm, params(2)) != alone
    company = [params(2), greedy(30), params(1), params(None), params(3)]
    prompts = [OTHER, OTHER, PROMPT, OTHER, PROMPT]
    assert tokens(generate(llm, prompts, company))[2] == alone


def test_seed_with_a_prompt_in_chunks(llm):
    long = (PROMPT + OTHER) * 3
    assert len(long) > 2 * OPTIONS["max_num_batched_tokens"]
    params = SamplingParams(seed=1, max_tokens=ANSWER, ignore_eos=True)
    alone = answer_of(llm, params, long)
    answers = tokens(generate(llm, [OTHER, long, PROMPT], params))
    assert answers[1] == alone


def test_several_answers(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=ANSWER, ignore_eos=True)
    (output,) = generate(llm, [PROMPT], params)
    answers = [tuple(answer.token_ids) for answer in output.outputs]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len(set(answers)) == 3
    (again,) = generate(llm, [PROMPT], params)
    assert [tuple(answer.token_ids) for answer in again.outputs] == answers


def test_beam_search(llm, oracle):
    width, length = 3, 6
    beams = [(0.0, [])]
    for _ in range(length):
        found = []
        for score, tail in beams:
            row = oracle.logprobs(PROMPT + tail)[-1]
            best = row.topk(2 * width)
            found += [
                (score + float(v), [*tail, int(t)])
                for v, t in zip(best.values, best.indices, strict=True)
            ]
        beams = sorted(found, reverse=True)[:width]
    params = BeamSearchParams(beam_width=width, max_tokens=length, ignore_eos=True)
    (output,) = llm.beam_search([{"prompt_token_ids": PROMPT}], params)
    got = [sequence.tokens[len(PROMPT) :] for sequence in output.sequences]
    assert got == [tail for _, tail in beams]
    for sequence, (score, _) in zip(output.sequences, beams, strict=True):
        assert math.isclose(sequence.cum_logprob, score, abs_tol=1e-4)


# --- Log-probabilities --------------------------------------------------------


def test_logprobs_of_sampled_tokens(llm, oracle):
    """They are the model's, whatever temperature and limits the token is drawn by."""
    params = SamplingParams(
        temperature=2.0,
        top_k=40,
        seed=1,
        max_tokens=ANSWER,
        logprobs=2,
        ignore_eos=True,
    )
    (output,) = generate(llm, [PROMPT], params)
    answer = list(output.outputs[0].token_ids)
    rows = oracle.after(PROMPT, answer)
    assert answer != rows.argmax(-1).tolist()
    for token, row, entries in zip(
        answer, rows, output.outputs[0].logprobs, strict=True
    ):
        assert set(entries) == {token, *row.topk(2).indices.tolist()}
        for other, entry in entries.items():
            assert math.isclose(entry.logprob, float(row[other]), abs_tol=1e-4)
            assert entry.rank == int((row > row[other]).sum()) + 1


def test_prompt_logprobs_of_a_prompt_in_chunks(llm, oracle):
    long = (PROMPT + OTHER) * 3
    params = greedy(2, prompt_logprobs=1)
    (output,) = generate(llm, [long], params)
    rows = oracle.after(long[:1], long[1:])
    entries = output.prompt_logprobs[1:]
    for token, row, found in zip(long[1:], rows, entries, strict=True):
        assert math.isclose(found[token].logprob, float(row[token]), abs_tol=1e-4)


# --- What the scheduler does --------------------------------------------------


def test_prompt_in_chunks(llm, oracle):
    long = (PROMPT + OTHER) * 4
    assert len(long) > 3 * OPTIONS["max_num_batched_tokens"]
    answers = tokens(generate(llm, [OTHER, long, PROMPT], greedy(12)))
    for prompt, answer in zip([OTHER, long, PROMPT], answers, strict=True):
        assert_greedy(oracle, prompt, answer)


def test_prefix_caching(llm, oracle):
    start = [(13 * i + 1) % 256 + 64 for i in range(96)]
    prompts = [start + PROMPT, start + OTHER]
    generate(llm, prompts[:1], greedy(1))
    hits = metric(llm, "prefix_cache_hits")
    answer = answer_of(llm, greedy(ANSWER), prompts[1])
    assert metric(llm, "prefix_cache_hits") - hits >= 80
    assert_greedy(oracle, prompts[1], answer)


def test_text_prompt(llm, oracle, tokenizer):
    text = "the quick brown fox jumps"
    (output,) = llm.generate([text], greedy(ANSWER), use_tqdm=False)
    prompt = tokenizer.encode(text)
    assert output.prompt_token_ids == prompt
    assert_greedy(oracle, prompt, list(output.outputs[0].token_ids))


def test_chat(llm, oracle, tokenizer):
    messages = [{"role": "user", "content": "is the rain in spain"}]
    (output,) = llm.chat([messages], greedy(ANSWER), use_tqdm=False)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert output.prompt_token_ids == prompt
    assert_greedy(oracle, prompt, list(output.outputs[0].token_ids))


@pytest.mark.parametrize("mode", MODES)
def test_preemption(checkpoint, oracle, mode):
    """Half of what all requests want fits: some are thrown out and computed again."""
    prompts = [[(7 * i + 31 * k) % 256 + 64 for i in range(20)] for k in range(6)]
    options = dict(num_gpu_blocks_override=14, max_model_len=128)
    with engine(checkpoint, **MODES[mode], **options) as llm, steady(llm):
        answers = tokens(generate(llm, prompts, greedy(40)))
        assert metric(llm, "num_preemptions") > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_greedy(oracle, prompt, answer)
