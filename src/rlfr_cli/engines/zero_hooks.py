"""What ZeRO's stage 3 does around a model's submodules, and where rlfr needs it otherwise.

Stage 3 gathers a submodule's weights by hooks before it runs and frees them afterwards, with collectives in which all
ranks take part. It remembers the order of submodules of a pass, to gather ahead; ranks whose orders differ wait for
each other for ever. Two modules would differ, and have no hooks here:

- the output head, which log-probabilities run once a chunk of tokens (``policy/logprobs.py``): ranks have different
  numbers of tokens. Its weights stay whole from a pass to the next optimiser step, which costs their memory;
- the root, whose hook fires once an output tensor that the loss uses: an idle rank has one, the others two. It has no
  weights of its own.

Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HOLDER = -1  # stands among the numbers of the submodules that use a parameter, of which none is negative


class StageThreeHooks:
    """DeepSpeed's hooks on a model that stage 3 has taken apart.

    Args:
        zero: DeepSpeed's optimiser.
        model: the transformers model.
    """

    def __init__(self, zero: Any, model: Any) -> None:
        self._offload = zero.parameter_offload
        self._head = model.get_output_embeddings()
        self._leave_root_and_head()

    def hold_head(self) -> None:
        """Gather the head's weights, if they are not here, and keep them until DeepSpeed takes all weights apart."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for parameter in self._head.parameters():
            if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                parameter.all_gather()
            parameter.ds_active_sub_modules.add(HOLDER)

    def let_go_of_head(self) -> None:
        """Let DeepSpeed free the head's weights."""
        for parameter in self._head.parameters():
            parameter.ds_active_sub_modules.discard(HOLDER)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Inside, the model runs without any; all its weights must be whole meanwhile."""
        for hook in self._all():
            hook.remove()
        self._offload.forward_hooks, self._offload.backward_hooks = [], []
        try:
            yield
        finally:
            self._offload._register_deepspeed_module(self._offload.module)
            self._leave_root_and_head()

    def _leave_root_and_head(self) -> None:
        spared = [self._offload.module, self._head]
        theirs = {id(hooks) for module in spared for hooks in (module._forward_hooks, module._forward_pre_hooks)}
        for hook in self._all():
            if id(hook.hooks_dict_ref()) in theirs:
                hook.remove()

    def _all(self) -> list[Any]:
        return [*self._offload.forward_hooks, *self._offload.backward_hooks]
