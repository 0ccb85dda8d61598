"""The online update on latents of real policies: with and without checkpointing, tuples and tensors, and how the
published update fails there.

The published update computes the flow's loss in hooks on the decoder blocks, inside the policy's training pass. Here it
is written out in a few lines, so that what must not happen is seen to happen there and not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from rlfr_cli.config.train_rl import OnlineConfig
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import accumulate_matching_gradients, noised_latents, squared_errors
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.policy.forward import TokenSequence, forward_batches, response_logprobs
from rlfr_cli.policy.loading import Policy
from rlfr_cli.policy.tapping import block_output, decoder_blocks
from rlfr_cli.rl.online import update_flow
from tiny_models import FAMILIES
from tiny_policies import HIDDEN, ModelFolders, random_sequences, tiny_flow

LENGTHS = [(4, 9), (7, 20), (3, 12), (6, 7)]
KINDS = [(checkpointing, as_tuple) for checkpointing in (False, True) for as_tuple in (False, True)]


@contextmanager
def tuple_outputs(policy: Policy) -> Iterator[None]:
    """Let every block give a tuple, as before transformers 5; what comes after it takes the first element."""
    blocks = list(decoder_blocks(policy.decoder))

    def first_of(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (block_output(inputs[0]), *inputs[1:])

    handles = [block.register_forward_hook(lambda _m, _i, output: (output, "attention")) for block in blocks]
    handles += [module.register_forward_pre_hook(first_of) for module in (*blocks[1:], policy.decoder.norm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def training_policy(
    folders: ModelFolders, *, checkpointing: bool, family: str = "qwen2", use_reentrant: bool = False
) -> Policy:
    """A policy in training mode, where transformers lets checkpointing act."""
    policy = folders.policy(family)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    policy.model.train()
    assert policy.model.is_gradient_checkpointing is checkpointing
    return policy


def latents_of(policy: Policy, flow: Flow, sequences: list[TokenSequence]) -> dict[int, Tensor]:
    latents: dict[int, Tensor] = {}
    for batch in forward_batches(policy, sequences, temperature=1.0, tapped=flow.tapped):
        latents.update(zip(batch.indices, batch.latents, strict=True))
    return latents


def weights_of(sequences: list[TokenSequence], accepted: set[int] | None = None) -> dict[int, Tensor]:
    return {
        index: torch.full((len(sequence.response),), float(accepted is None or index in accepted))
        for index, sequence in enumerate(sequences)
    }


class Gradients(NamedAdamW):
    """Keeps the gradients of its last step."""

    def step(self, learning_rate: float, **options: Any) -> Any:
        self.last = {name: None if p.grad is None else p.grad.clone() for name, p in self.parameters.items()}
        return super().step(learning_rate, **options)


def optimiser_of(flow: Flow) -> Gradients:
    return Gradients(flow.network.named_parameters(), weight_decay=0.01, clip_norm=1.0)


def loss_on(flow: Flow, latents: dict[int, Tensor]) -> float:
    """The fitting loss with fixed noise, 8 draws."""
    pairs = flow.pair(list(latents.values()))
    generator = keyed_generator("cpu", "held out")
    return float(accumulate_matching_gradients(flow.network, pairs, generator, noise_repeats=8, backward=False).loss)


def train_policy(policy: Policy, sequences: list[TokenSequence]) -> None:
    """One step of gradient descent on the policy, through whatever checkpointing it has."""
    logprobs_K, _ = response_logprobs(policy, sequences, 1.0)
    (-logprobs_K.mean()).backward()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_and_kind_of_output_change_no_bit_of_the_update(family: str, model_folders: ModelFolders) -> None:
    sequences, states = random_sequences(LENGTHS), []
    for checkpointing, as_tuple in KINDS:
        policy, flow = training_policy(model_folders, checkpointing=checkpointing, family=family), tiny_flow()
        before = [p.detach().clone() for p in policy.model.parameters()]
        with tuple_outputs(policy) if as_tuple else nullcontext():
            optimiser = optimiser_of(flow)
            latents = latents_of(policy, flow, sequences)
            update_flow(flow, optimiser, latents, weights_of(sequences), OnlineConfig(), (0.8,), (0, 1))
        missed = [name for name, g in optimiser.last.items() if g is None or not float(g.abs().max()) > 0]
        assert len(optimiser.last) > 20
        assert not missed
        assert all(p.grad is None for p in policy.model.parameters())
        assert all(torch.equal(p, old) for p, old in zip(policy.model.parameters(), before, strict=True))
        states.append(flow.network.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize(("checkpointing", "as_tuple"), KINDS)
def test_the_loss_on_fresh_accepted_rollouts_falls_while_the_policy_trains_too(
    checkpointing: bool, as_tuple: bool, model_folders: ModelFolders
) -> None:
    """Of each batch only every second response is accepted. The last batch is never trained on."""
    policy, flow = training_policy(model_folders, checkpointing=checkpointing), tiny_flow(zero=True)
    optimiser, config = optimiser_of(flow), OnlineConfig(online_learning_rate=3e-3)
    with tuple_outputs(policy) if as_tuple else nullcontext():
        fresh = random_sequences(LENGTHS, 99)
        first = loss_on(flow, latents_of(policy, flow, fresh))
        for step in range(30):
            sequences = random_sequences(LENGTHS, step)
            latents = latents_of(policy, flow, sequences)
            train_policy(policy, sequences)
            update_flow(flow, optimiser, latents, weights_of(sequences, {0, 2}), config, (0.8,), (0, step))
        assert loss_on(flow, latents_of(policy, flow, fresh)) < 0.85 * first


@pytest.mark.parametrize("context", list(Context))
def test_a_latent_that_hangs_on_the_policys_graph_sends_no_gradient_into_it(
    context: Context, model_folders: ModelFolders
) -> None:
    """Were a hook ever to keep the graph, target and condition would still be cut from it."""
    sequences = random_sequences(LENGTHS[:1])
    policy, flow = model_folders.policy(), tiny_flow(context=context)
    kept: list[Tensor] = []
    blocks = decoder_blocks(policy.decoder)
    handles = [
        blocks[layer].register_forward_hook(lambda _m, _i, output: kept.append(block_output(output)[0]))
        for layer in flow.layers.indices
    ]
    policy.decoder(input_ids=torch.tensor([[*sequences[0].prompt, *sequences[0].response]]), use_cache=False)
    for handle in handles:
        handle.remove()
    latents = {0: torch.stack(kept, dim=1)[len(sequences[0].prompt) - 1 :]}
    assert latents[0].grad_fn is not None
    optimiser = optimiser_of(flow)
    metrics = update_flow(flow, optimiser, latents, weights_of(sequences), OnlineConfig(), (0.8,), (0, 1))
    assert metrics["flow/steps"] == 1
    assert all(g is not None and float(g.abs().max()) > 0 for g in optimiser.last.values())
    assert all(p.grad is None for p in policy.model.parameters())


# The published update


def published_losses(policy: Policy, flow: Flow, sequences: list[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Loss of the policy, and loss of the flow as hooks see it in the same pass; the condition alone is detached."""
    seen: list[Tensor] = []

    def hook_of(position: float) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden_BSD = block_output(output)
            target_ND = hidden_BSD[:, :-1].reshape(-1, HIDDEN)
            condition_ND = hidden_BSD[:, 1:].detach().reshape(-1, HIDDEN)
            noise_ND, times = torch.randn_like(target_ND), torch.tensor([0.8])
            noised_ND = noised_latents(target_ND, noise_ND, times)
            velocity_ND = flow.network(noised_ND, times, condition_ND, torch.tensor([position]))
            seen.append(squared_errors(velocity_ND, target_ND, noise_ND).mean())

        return hook

    blocks = decoder_blocks(policy.decoder)
    handles = [
        blocks[layer].register_forward_hook(hook_of(position))
        for layer, position in zip(flow.layers.indices, flow.layers.positions, strict=True)
    ]
    logprobs_K, _ = response_logprobs(policy, sequences, 1.0)
    flow_loss = torch.stack(seen).mean()
    for handle in handles:
        handle.remove()
    return -logprobs_K.mean(), flow_loss


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_published_update_never_reaches_the_flow_and_ours_does_under_the_same_checkpoint(
    model_folders: ModelFolders,
) -> None:
    """A reentrant checkpoint runs block and hook without a graph, so the loss is a leaf. Without the line that makes
    it look trainable, ``backward`` would refuse it; with it, a loss is logged and no gradient arrives.
    """
    sequences = random_sequences(LENGTHS)
    policy, flow = training_policy(model_folders, checkpointing=True, use_reentrant=True), tiny_flow()
    before = {name: p.detach().clone() for name, p in flow.network.named_parameters()}
    optimiser = optimiser_of(flow)
    for _ in range(3):
        policy_loss, flow_loss = published_losses(policy, flow, sequences)
        assert flow_loss.is_leaf
        assert not flow_loss.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            flow_loss.backward()
        flow_loss.requires_grad = True
        (policy_loss + flow_loss).backward()
        assert float(flow_loss.detach()) > 1  # what the log would show
        assert all(p.grad is None for p in flow.network.parameters())
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in policy.model.parameters())
        optimiser.step(1e-2)
    assert all(torch.equal(p, before[name]) for name, p in flow.network.named_parameters())

    policy.model.zero_grad(set_to_none=True)
    latents = latents_of(policy, flow, sequences)
    update_flow(flow, optimiser, latents, weights_of(sequences), OnlineConfig(), (0.8,), (0, 1))
    assert all(g is not None and float(g.abs().max()) > 0 for g in optimiser.last.values())
    assert all(not torch.equal(p, before[name]) for name, p in flow.network.named_parameters())
    assert all(p.grad is None for p in policy.model.parameters())


def test_the_published_loss_with_a_graph_reaches_the_policy_and_ours_does_not(model_folders: ModelFolders) -> None:
    """Without a checkpoint the line itself fails; without the line, the target's gradient goes into the policy."""
    sequences = random_sequences(LENGTHS)
    policy, flow = training_policy(model_folders, checkpointing=False), tiny_flow()
    _, flow_loss = published_losses(policy, flow, sequences)
    with pytest.raises(RuntimeError, match="leaf"):
        flow_loss.requires_grad = True
    flow_loss.backward()
    assert all(p.grad is not None for p in flow.network.parameters())
    reached = [name for name, p in policy.model.named_parameters() if p.grad is not None]
    assert any(name.startswith("model.layers.0.") for name in reached)

    policy.model.zero_grad(set_to_none=True)
    update_flow(
        flow,
        optimiser_of(flow),
        latents_of(policy, flow, sequences),
        weights_of(sequences),
        OnlineConfig(),
        (0.8,),
        (0, 1),
    )
    assert all(p.grad is None for p in policy.model.parameters())
