"""Generation with transformers: what is drawn, its log-probabilities, and where responses end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlfr_cli.engines.generation import Generation, GenerationRequest, Sampling
from rlfr_cli.engines.hf import HfEngine, draw_tokens, filter_probabilities
from rlfr_cli.policy.forward import TokenSequence, forward_batches, response_logprobs
from rlfr_cli.policy.loading import Policy, load_policy
from tiny_models import FAMILIES, make_model_folder, make_tokenizer
from tiny_policies import CPU, CPU_BF16, END, ModelFolders, random_sequences

PROMPTS = [tuple(s.prompt) for s in random_sequences([(4, 1), (11, 1), (2, 1), (20, 1)])]
REQUESTS = [GenerationRequest(prompt, str(i), j) for i, prompt in enumerate(PROMPTS) for j in range(3)]


def generate(
    policy: Policy,
    sampling: Sampling,
    requests: Sequence[GenerationRequest] = REQUESTS,
    *,
    key: tuple[int | str, ...] = (0,),
    budget: int = 16384,
) -> list[Generation]:
    return HfEngine(policy, budget).generate(requests, sampling, key=key)


# Log-probabilities


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, max_new_tokens=24),
        Sampling(temperature=0.7, top_p=0.6, top_k=20, max_new_tokens=12),
        Sampling(temperature=0.0, max_new_tokens=12),
    ],
    ids=["plain", "filtered", "greedy"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logprobs_are_those_of_the_forward_pass(
    family: str, sampling: Sampling, model_folders: ModelFolders
) -> None:
    """Of the full softmax at the temperature, before top-p and top-k; longer than the 16 tokens of Gemma's window."""
    policy = model_folders.policy(family)
    generations = generate(policy, sampling)
    sequences = [TokenSequence(r.prompt_token_ids, g.token_ids) for r, g in zip(REQUESTS, generations, strict=True)]
    for batch in forward_batches(policy, sequences, temperature=sampling.temperature):
        for index, logprobs in zip(batch.indices, batch.logprobs, strict=True):
            recorded = torch.tensor(generations[index].logprobs)
            torch.testing.assert_close(recorded, logprobs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_generate(family: str, model_folders: ModelFolders) -> None:
    policy = model_folders.policy(family)
    requests = [GenerationRequest(prompt, str(i), 0) for i, prompt in enumerate(PROMPTS)]
    generations = generate(policy, Sampling(temperature=0.0, max_new_tokens=24), requests)
    for request, generation in zip(requests, generations, strict=True):
        prompt = torch.tensor([request.prompt_token_ids])
        wanted = policy.model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :].tolist()
        assert generation.token_ids == wanted
        assert generation.finish_reason == ("stop" if wanted[-1] == END else "length")


# Where responses end


def test_the_end_token_is_kept_and_is_last_when_the_reason_is_stop(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    policy.end_token_ids = frozenset(range(10, 30))  # often drawn, so that both reasons occur
    generations = generate(policy, Sampling(max_new_tokens=6))
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    for generation in generations:
        ends = [token in policy.end_token_ids for token in generation.token_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (generation.finish_reason == "stop")
        assert len(generation.token_ids) == 6 or ends[-1]
        assert len(generation.logprobs) == len(generation.token_ids)


def test_an_end_token_at_the_limit_is_a_stop(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    policy.end_token_ids = frozenset(range(107))
    assert {(g.finish_reason, len(g.token_ids)) for g in generate(policy, Sampling(max_new_tokens=1))} == {("stop", 1)}


def test_finished_rows_leave_the_batch(model_folders: ModelFolders) -> None:
    """Each distinct prompt is read once; after that a row costs one forward row for each token but its last."""
    policy = model_folders.policy()
    policy.end_token_ids = frozenset(range(10, 30))
    rows: list[tuple[int, ...]] = []
    handle = policy.model.register_forward_pre_hook(
        lambda _module, _inputs, named: rows.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    generations = generate(policy, Sampling(max_new_tokens=8))
    handle.remove()
    assert rows[0] == (len(PROMPTS), max(map(len, PROMPTS)))
    assert all(width == 1 for _, width in rows[1:])
    assert len({len(g.token_ids) for g in generations}) > 2
    assert sum(count for count, _ in rows[1:]) == sum(len(g.token_ids) - 1 for g in generations)


def test_the_context_cuts_a_response(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    policy.end_token_ids = frozenset()
    requests = [GenerationRequest((9,) * length, "0", 0) for length in (500, 511, 3)]
    generations = generate(policy, Sampling(max_new_tokens=20), requests)
    assert [(len(g.token_ids), g.finish_reason) for g in generations] == [(12, "length"), (1, "length"), (20, "length")]


def test_a_stop_string_ends_a_response(model_folders: ModelFolders) -> None:
    """Llama's tokenizer reads this one character a token, so the string lies across tokens."""
    policy = model_folders.policy("llama")
    policy.end_token_ids = frozenset()
    request = [GenerationRequest(PROMPTS[1], "0", 0)]
    sampling = Sampling(max_new_tokens=30)
    whole = generate(policy, sampling, request)[0]
    stop = whole.text[7:10]
    assert len(whole.token_ids) == 30
    end = whole.text.index(stop) + 3
    cut = generate(policy, Sampling(max_new_tokens=30, stop=("never in it", stop)), request)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[:end]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_text_leaves_special_tokens_out(model_folders: ModelFolders) -> None:
    policy = model_folders.policy("llama")
    for generation in generate(policy, Sampling(max_new_tokens=40)):
        assert generation.text == policy.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        assert "<|" not in generation.text


# Random numbers, batches, and the model that is shared


def test_a_key_fixes_the_tokens_bit_for_bit(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    sampling = Sampling(max_new_tokens=10)
    torch.manual_seed(1)
    first = generate(policy, sampling, key=(0, "unit", 3))
    generate(policy, sampling, key=(0, "unit", 4))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = generate(policy, sampling, key=(0, "unit", 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert again == first
    other = generate(policy, sampling, key=(0, "unit", 4))
    assert [g.token_ids for g in other] != [g.token_ids for g in first]
    assert len({tuple(g.token_ids) for g in first}) > len(first) // 2


def test_results_come_in_the_order_of_requests_whatever_the_batches(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    sampling = Sampling(temperature=0.0, max_new_tokens=10)
    one_by_one = [generate(policy, sampling, [request])[0].token_ids for request in REQUESTS]
    for budget in (1, 45, 10_000):
        assert [g.token_ids for g in generate(policy, sampling, budget=budget)] == one_by_one


def test_finished_responses_are_reported(model_folders: ModelFolders) -> None:
    told: list[tuple[int, int]] = []
    generations = HfEngine(model_folders.policy()).generate(
        REQUESTS, Sampling(max_new_tokens=5), key=(0,), on_finished=lambda *counts: told.append(counts)
    )
    assert sum(responses for responses, _ in told) == len(REQUESTS)
    assert sum(tokens for _, tokens in told) == sum(len(g.token_ids) for g in generations)


def test_no_requests_no_responses(model_folders: ModelFolders) -> None:
    assert generate(model_folders.policy(), Sampling(), []) == []


def test_the_side_on_which_a_tokenizer_pads_changes_nothing(tmp_path: Path) -> None:
    results = []
    for side in ("left", "right"):
        for pad_token in (True, False):
            folder = tmp_path / f"{side}-{pad_token}"
            make_model_folder(folder, "llama", tokenizer=make_tokenizer(padding_side=side, pad_token=pad_token))
            generations = generate(load_policy(folder, CPU), Sampling(max_new_tokens=10))
            results.append([(g.token_ids, g.logprobs) for g in generations])
    assert results[1:] == results[:1] * 3


def test_a_model_in_training_mode_is_left_in_it_and_can_still_be_trained(model_folders: ModelFolders) -> None:
    policy = model_folders.policy(placement=CPU_BF16)
    policy.model.train()
    generations = generate(policy, Sampling(max_new_tokens=4))
    assert policy.model.training
    assert not policy.model.base_model.embed_tokens.weight.is_inference()
    sequences = [TokenSequence(r.prompt_token_ids, g.token_ids) for r, g in zip(REQUESTS, generations, strict=True)]
    response_logprobs(policy, sequences, 1.0)[0].sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in policy.model.parameters())


def test_each_float32_weight_is_cast_once_a_call(model_folders: ModelFolders) -> None:
    policy = model_folders.policy(tied=False, placement=CPU_BF16)
    policy.end_token_ids = frozenset()
    weights = {p.data_ptr(): name for name, p in policy.model.named_parameters()}
    casts: list[str] = []

    class CountCasts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                casts.append(weights[args[0].data_ptr()])
            return function(*args, **(kwargs or {}))

    with CountCasts():
        generate(policy, Sampling(max_new_tokens=5))
    assert "model.layers.0.mlp.up_proj.weight" in casts
    assert len(casts) == len(set(casts))


# Drawing


def test_top_k_and_top_p_by_hand() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])

    def kept(top_p: float, top_k: int) -> list[float]:
        return filter_probabilities(probabilities, top_p, top_k)[0].tolist()

    assert kept(1.0, 0) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert kept(1.0, 2) == pytest.approx([0, 0.4, 0, 0.3])
    assert kept(1.0, 99) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert kept(0.5, 0) == pytest.approx([0, 0.4, 0, 0.3])  # 0.4 alone does not hold one half
    assert kept(0.35, 0) == pytest.approx([0, 0.4, 0, 0])
    assert kept(1e-6, 0) == pytest.approx([0, 0.4, 0, 0])  # the likeliest always stays
    assert kept(0.75, 3) == pytest.approx([0, 0.4, 0, 0.3])  # 0.75 of the 0.9 that top-k left is 0.675
    exactly_half = torch.tensor([[0.25, 0.5, 0.25]])
    assert filter_probabilities(exactly_half, 0.5, 0).tolist() == [[0, 0.5, 0]]
    assert probabilities[0].tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])


def test_rows_are_filtered_apart() -> None:
    rows = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.5, 0.3]])
    assert (filter_probabilities(rows, 0.7, 0) > 0).tolist() == [[True, False, False], [False, True, True]]


def test_tokens_are_drawn_in_proportion() -> None:
    """Probabilities 0.2 and 0.8 at temperature 1; 1/17 and 16/17 at one half."""
    logits = torch.tensor([0.2, 0.8]).log().repeat(20_000, 1)
    for temperature, wanted in ((1.0, 0.8), (0.5, 16 / 17)):
        generator = torch.Generator().manual_seed(0)
        tokens, logprobs = draw_tokens(logits, Sampling(temperature=temperature), generator)
        assert float(tokens.float().mean()) == pytest.approx(wanted, abs=0.01)
        assert float(logprobs[tokens == 1][0].exp()) == pytest.approx(wanted, rel=1e-4)


def test_filters_shape_the_draw_and_not_the_recorded_logprob() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().repeat(500, 1)
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = draw_tokens(logits, Sampling(top_k=2), generator)
    assert set(tokens.tolist()) == {1, 2}
    assert float(logprobs[tokens == 1][0].exp()) == pytest.approx(0.2, rel=1e-4)


def test_greedy_takes_the_likeliest_and_records_the_plain_softmax() -> None:
    logits = torch.tensor([[0.1, 0.7, 0.2]]).log()
    tokens, logprobs = draw_tokens(logits, Sampling(temperature=0.0), torch.Generator())
    assert tokens.tolist() == [1]
    assert float(logprobs[0].exp()) == pytest.approx(0.7, rel=1e-4)
