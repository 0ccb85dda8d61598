"""Which states are tapped: outputs of blocks before the final norm, and the final normed state, in every family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlfr_cli.errors import ConfigError, InputError
from rlfr_cli.policy.forward import decoder_latents, forward_batches
from rlfr_cli.policy.loading import load_decoder
from rlfr_cli.policy.tapping import decoder_blocks, tap, tapped_layers
from rlfr_cli.states import FINAL_NORM, State
from tiny_models import FAMILIES
from tiny_policies import CPU, CPU_BF16, HIDDEN, ModelFolders, random_sequences

SEQUENCES = random_sequences([(4, 9), (7, 25), (3, 5)])  # longer than the 16 tokens of Gemma's window


class ToyDecoder(nn.Module):
    """Blocks that give a tensor or, as before transformers 5, a tuple; so does the decoder, of a doubled state."""

    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.as_tuple = as_tuple
        for layer in self.layers if as_tuple else ():
            layer.register_forward_hook(lambda _module, _inputs, output: (output, "attention"))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))

    def forward(self, hidden: Tensor) -> Any:
        for layer in self.layers:
            output = layer(hidden)
            hidden = output[0] if self.as_tuple else output
        return (2 * hidden, "cache") if self.as_tuple else 2 * hidden


@pytest.mark.parametrize(
    ("num_blocks", "layers"),
    [
        (28, (7, 14, 21)),
        (24, (6, 12, 18)),
        (6, (2, 3, 4)),  # 1.5 and 4.5 go to the even neighbour
        (10, (2, 5, 8)),  # 2.5 and 7.5
        (36, (9, 18, 27)),
    ],
)
def test_fractions_round_halves_to_even(num_blocks: int, layers: tuple[int, ...]) -> None:
    assert tapped_layers(num_blocks, (0.25, 0.5, 0.75)) == layers


def test_the_whole_depth_is_the_last_block() -> None:
    assert tapped_layers(8, (0.0, 1.0)) == (0, 7)


def test_indices_replace_fractions_and_keep_their_order() -> None:
    assert tapped_layers(8, (0.25, 0.5), (5, 1)) == (5, 1)


@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_outside_the_model_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match="blocks 0 to 7"):
        tapped_layers(8, (), (index,))


def test_a_block_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice") as caught:
        tapped_layers(2, (0.25, 0.5, 0.75))
    assert "--layer-index" in str(caught.value)


def test_tuple_and_tensor_outputs_give_the_same_latents() -> None:
    hidden = torch.randn(2, 5, 3)
    kept = []
    for as_tuple in (False, True):
        decoder = ToyDecoder(as_tuple=as_tuple)
        with tap(decoder, (0, 2, FINAL_NORM)) as taps:
            taps.select(torch.tensor([1, 9]))
            decoder(hidden)
            kept.append(taps.latents())
    assert kept[0].shape == (2, 3, 3)
    assert torch.equal(kept[0], kept[1])
    first = ToyDecoder(as_tuple=False).layers[0](hidden)
    torch.testing.assert_close(kept[0][:, 0], torch.stack([first[0, 1], first[1, 4]]))
    assert torch.equal(kept[0][:, 2], 2 * kept[0][:, 1])


def test_layers_keep_the_order_asked_for_and_carry_no_gradient() -> None:
    decoder, hidden = ToyDecoder(as_tuple=False), torch.randn(1, 4, 3)
    with tap(decoder, (2, FINAL_NORM, 0)) as taps:
        taps.select(torch.arange(4))
        last = decoder(hidden)
    latents = taps.latents()
    assert last.requires_grad
    assert not latents.requires_grad
    torch.testing.assert_close(latents[:, 1], last[0])
    torch.testing.assert_close(latents[:, 0], last[0] / 2)


def test_hooks_leave_with_the_block_of_code_even_after_an_error() -> None:
    decoder = ToyDecoder(as_tuple=False)
    with pytest.raises(AssertionError, match="select"), tap(decoder, (0, 1, FINAL_NORM)):
        decoder(torch.zeros(1, 1, 3))
    assert not any(module._forward_hooks for module in (decoder, *decoder.layers))


def test_latents_of_the_pass_before_are_not_given_twice() -> None:
    decoder = ToyDecoder(as_tuple=False)
    with tap(decoder, (1,)) as taps:
        taps.select(torch.tensor([0]))
        decoder(torch.randn(1, 2, 3))
        taps.select(torch.tensor([0]))
        with pytest.raises(AssertionError, match="did not run"):
            taps.latents()


def test_a_decoder_without_blocks_is_refused() -> None:
    decoder = ToyDecoder(as_tuple=False)
    decoder.layers = nn.ModuleList([nn.Linear(3, 3)])
    with pytest.raises(InputError, match="no list of 3 decoder blocks"):
        decoder_blocks(decoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_block_outputs_before_the_final_norm(family: str, model_folders: ModelFolders) -> None:
    policy = model_folders.policy(family)
    prompt, response = SEQUENCES[1].prompt, SEQUENCES[1].response
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        hidden_states = policy.decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    batches = list(forward_batches(policy, SEQUENCES, temperature=1.0, tapped=(0, 1, 2, 3), num_prompt=3))
    latents = next(b.latents[b.indices.index(1)] for b in batches if 1 in b.indices)
    assert latents.shape == (3 + len(response), 4, HIDDEN)
    rows = slice(len(prompt) - 3, None)
    for block in (0, 1, 2):
        torch.testing.assert_close(latents[:, block], hidden_states[block + 1][0, rows], rtol=1e-4, atol=1e-5)
    normed = hidden_states[4][0, rows]
    assert float((latents[:, 3] - normed).abs().max()) > 0.01
    torch.testing.assert_close(policy.decoder.norm(latents[:, 3]), normed, rtol=1e-4, atol=1e-5)


def final_norm_by_hook(policy: Any, ids: list[int]) -> Tensor:
    """Output [positions, hidden] of the model's own last norm, as the output head gets it."""
    kept: list[Tensor] = []
    handle = policy.model.model.norm.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with torch.no_grad():
        policy.model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return kept[0][0]


def latents_of(policy: Any, tapped: tuple[State, ...]) -> list[Tensor]:
    kept: list[Tensor] = [torch.empty(0)] * len(SEQUENCES)
    for batch in forward_batches(policy, SEQUENCES, temperature=1.0, tapped=tapped, num_prompt=2):
        for index, latents in zip(batch.indices, batch.latents, strict=True):
            kept[index] = latents
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_normed_state_is_what_the_output_head_gets(family: str, model_folders: ModelFolders) -> None:
    policy = model_folders.policy(family)
    ours = latents_of(policy, (1, FINAL_NORM))
    decoder = load_decoder(model_folders.folder(family), CPU, (1, FINAL_NORM))
    assert len(decoder_blocks(decoder)) == 4
    with tap(decoder, (1, FINAL_NORM)) as taps:
        alone = decoder_latents(decoder, taps, SEQUENCES, 2, torch.device("cpu"))
    for index, sequence in enumerate(SEQUENCES):
        wanted = final_norm_by_hook(policy, [*sequence.prompt, *sequence.response])[len(sequence.prompt) - 2 :]
        torch.testing.assert_close(ours[index][:, 1], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[index], ours[index], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_in_training_mode_changes_no_tapped_state(model_folders: ModelFolders) -> None:
    policy, tapped = model_folders.policy("llama"), (1, 3, FINAL_NORM)
    wanted = latents_of(policy, tapped)
    policy.model.train()
    policy.model.gradient_checkpointing_enable()
    for ours, theirs in zip(latents_of(policy, tapped), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_states_of_bfloat16_compute_stand_beside_each_other(model_folders: ModelFolders) -> None:
    exact = latents_of(model_folders.policy(), (1, FINAL_NORM))
    rough = latents_of(model_folders.policy(placement=CPU_BF16), (1, FINAL_NORM))
    for ours, theirs in zip(rough, exact, strict=True):
        assert float((ours.float() - theirs).abs().max()) < 0.1 * float(theirs.abs().max())


def test_a_truncated_decoder_never_gives_a_final_normed_state(model_folders: ModelFolders) -> None:
    decoder = load_decoder(model_folders.folder(), CPU, (0, 2))
    assert decoder.blocks_left_out == 1
    with (
        pytest.raises(ValueError, match="final-norm was asked of a decoder without the last 1"),
        tap(decoder, (0, FINAL_NORM)),
    ):
        pass
    assert load_decoder(model_folders.folder(), CPU, (3,)).blocks_left_out == 0


def truncated_latents(model_folders: ModelFolders, family: str, layers: tuple[int, ...]) -> tuple[Any, list[Tensor]]:
    decoder = load_decoder(model_folders.folder(family), CPU, layers)
    with tap(decoder, layers) as taps:
        return decoder, decoder_latents(decoder, taps, SEQUENCES, 2, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(0,), (1, 2), (3, 1)])
def test_a_truncated_decoder_gives_the_same_latents(
    family: str, layers: tuple[int, ...], model_folders: ModelFolders
) -> None:
    decoder, latents = truncated_latents(model_folders, family, layers)
    assert len(decoder_blocks(decoder)) == max(layers) + 1
    policy = model_folders.policy(family)
    wanted: dict[int, Tensor] = {}
    for batch in forward_batches(policy, SEQUENCES, temperature=1.0, tapped=layers, num_prompt=2):
        wanted.update(zip(batch.indices, batch.latents, strict=True))
    for index, ours in enumerate(latents):
        torch.testing.assert_close(ours, wanted[index], rtol=1e-5, atol=1e-5)
