"""What surrounds vLLM, without it: weights on their way, and what is added to its workers, whose samplers are fakes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rlfr_cli.config.engine import WeightTransfer
from rlfr_cli.engines import vllm_weights
from rlfr_cli.engines.vllm_process import LoopThread, all_of, interruptible
from rlfr_cli.engines.vllm_weights import FileRoute, TransferRoute, free_port, open_route, write_files
from rlfr_cli.engines.vllm_worker import WorkerExtension, read_tensors
from rlfr_cli.errors import WorkError

TIED = torch.arange(6.0).reshape(2, 3)
WEIGHTS = [("embed", TIED), ("norm", torch.ones(3) / 3), ("head", TIED), ("column", TIED.t())]

# Weights


def test_files_hold_every_tensor_once_in_the_engines_dtype(tmp_path: Path) -> None:
    files = write_files(WEIGHTS, tmp_path, torch.bfloat16, bytes_per_file=16)
    assert [Path(file).name for file in files] == ["00000.safetensors", "00001.safetensors"]
    read = dict(read_tensors(files))
    assert read.keys() == dict(WEIGHTS).keys()
    for name, tensor in WEIGHTS:
        assert torch.equal(read[name], tensor.bfloat16())
    assert write_files([], tmp_path, torch.float32) == []


def test_the_files_are_there_while_they_are_read_and_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_weights, "SHARED_MEMORY", tmp_path)
    taken: dict[str, torch.Tensor] = {}

    def call(method: str, *, files: list[str]) -> None:
        assert method == "rlfr_load_weights"
        assert all(Path(file).is_relative_to(tmp_path) for file in files)
        taken.update(read_tensors(files))

    FileRoute(call, torch.float32).send(WEIGHTS)
    assert torch.equal(taken["norm"], WEIGHTS[1][1])
    assert list(tmp_path.iterdir()) == []

    def fail(method: str, *, files: list[str]) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        FileRoute(fail, torch.float32).send(WEIGHTS)
    assert list(tmp_path.iterdir()) == []


def test_each_transfer_has_its_route() -> None:
    def route(transfer: WeightTransfer) -> object:
        return open_route(transfer, lambda *_: None, torch.float32, 2, torch.device("cuda:1"))

    assert isinstance(route(WeightTransfer.FILE), FileRoute)
    for transfer in (WeightTransfer.IPC, WeightTransfer.NCCL):
        opened = route(transfer)
        assert isinstance(opened, TransferRoute)
        assert opened.transfer is transfer


@pytest.mark.parametrize("transfer", [WeightTransfer.IPC, WeightTransfer.NCCL])
def test_vllms_senders_work_on_the_trainers_device(transfer: WeightTransfer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the current one, which stays the first GPU with --device cuda:1; here `meta` stands for that."""
    current: list[str] = ["cuda:0"]
    sent: list[tuple[str, str, torch.dtype, str]] = []

    @contextmanager
    def become_current(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    def trainer_init(info: Any, client: Any, source: Any) -> Any:
        shaken.append((current[-1], info))

        def send_weights() -> None:  # as vLLM's: names, dtypes and shapes of all first
            told = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
            assert told == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
            sent.extend((name, str(tensor.device), tensor.dtype, current[-1]) for name, tensor in source)

        return SimpleNamespace(send_weights=send_weights)

    shaken: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "device", become_current)
    for name, members in {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {
            "WeightTransferTrainerFactory": SimpleNamespace(trainer_init=trainer_init),
            "ParamMeta": lambda name, dtype, shape: SimpleNamespace(name=name, dtype=dtype, shape=shape),
            "WeightSource": object,
        },
        "vllm.distributed.weight_transfer.ipc_engine": {"IPCTrainerInitInfo": SimpleNamespace},
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": SimpleNamespace},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    route = open_route(transfer, lambda *_: None, torch.bfloat16, 2, torch.device("meta"))
    route.send(iter(WEIGHTS))
    route.send(iter(WEIGHTS[:1]))
    assert sent == [(name, "meta", torch.bfloat16, "meta") for name, _ in [*WEIGHTS, WEIGHTS[0]]]
    ((device, info),) = shaken
    assert (device, info.rank) == ("meta", 0)
    if transfer is WeightTransfer.NCCL:
        assert (info.master_address, info.world_size) == ("127.0.0.1", 3)


def test_a_free_port_is_one_that_can_be_listened_at() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def worker(load: Callable[[dict[str, torch.Tensor]], set[str] | None], quantization: str | None = None) -> Any:
    """As much of vLLM's worker as loading touches: ``reload_weights`` calls the model's ``load_weights``."""

    class Model(torch.nn.Linear):
        def load_weights(self, weights: Any) -> set[str] | None:
            return load(dict(weights))

    model = Model(2, 2)

    def reload_weights(weights_iterator: Any) -> None:
        model.load_weights(weights_iterator)

    return SimpleNamespace(
        get_model=lambda: model,
        reload_weights=reload_weights,
        model_config=SimpleNamespace(quantization=quantization),
    )


def test_parameters_that_no_weight_filled_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlfr_cli.engines.vllm_worker.pack_output_head", lambda model: None)
    files = write_files([("weight", torch.ones(2, 2)), ("bias", torch.ones(2))], tmp_path, torch.float32)
    whole = worker(lambda weights: set(weights))
    WorkerExtension.rlfr_load_weights(whole, files)
    assert "load_weights" not in vars(whole.get_model()), "the class's own method is back"
    with pytest.raises(ValueError, match="lack 1 of 2 parameters, such as bias"):
        WorkerExtension.rlfr_load_weights(worker(lambda weights: {"weight"}), files)
    with pytest.raises(ValueError, match="lack 2 of 2"):
        WorkerExtension.rlfr_load_weights(worker(lambda weights: None), files)
    WorkerExtension.rlfr_load_weights(worker(lambda weights: None, quantization="fp8"), files)


# Log-probabilities before top-k and top-p


LOGITS = torch.tensor([[3.0, 1.0, 2.0, 0.0]])


def keep_the_likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill_(logits < logits.max(), -torch.inf)  # in place, as vLLM's filters do


def test_the_first_sampler_returns_logprobs_from_before_the_filters() -> None:
    seen = []

    def draw(logits: torch.Tensor, generators: dict[int, Any], k: Any, p: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((generators, k, p))
        kept = keep_the_likeliest(logits)
        return kept.argmax(-1), kept.log_softmax(-1)

    sampler = SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=draw))
    WorkerExtension.rlfr_record_unfiltered_logprobs(SimpleNamespace(model_runner=SimpleNamespace(sampler=sampler)))
    tokens, logprobs = sampler.topk_topp_sampler.forward(LOGITS.clone(), {0: "g"}, 1, None)
    assert tokens.tolist() == [0]
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1))
    assert seen == [({0: "g"}, 1, None)]


def test_the_second_sampler_returns_logits_from_before_the_filters() -> None:
    def draw(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert others == ("mapping", 1, None)
        kept = keep_the_likeliest(logits)
        return kept.argmax(-1), kept

    sampler = SimpleNamespace(_sample_random=draw)
    WorkerExtension.rlfr_record_unfiltered_logprobs(SimpleNamespace(model_runner=SimpleNamespace(sampler=sampler)))
    tokens, logits = sampler._sample_random(LOGITS.clone(), "mapping", 1, None)
    assert tokens.tolist() == [0]
    assert torch.equal(logits, LOGITS)


def test_a_worker_without_a_sampler_has_nothing_to_change() -> None:
    WorkerExtension.rlfr_record_unfiltered_logprobs(SimpleNamespace(model_runner=SimpleNamespace(sampler=None)))


# The event loop, and Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_start_that_swallows_keyboard_interrupts(number: signal.Signals) -> None:
    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def start() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                pytest.fail("vLLM would go on")

    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_signals_that_nobody_handles_are_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    thread = threading.Thread(target=lambda: interruptible().__enter__())
    thread.start()
    thread.join()
    assert callable(signal.getsignal(signal.SIGINT))


def test_results_come_in_order_and_the_first_failure_ends_the_others() -> None:
    loop = LoopThread()
    cancelled: list[str] = []

    async def wait(seconds: float, name: str) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise
        return name

    async def fail() -> str:
        await asyncio.sleep(0.01)
        raise ValueError("broken")

    assert loop.run(all_of([wait(0.02, "slow"), wait(0.0, "quick")])) == ["slow", "quick"]
    assert loop.run(all_of([])) == []
    with pytest.raises(ValueError, match="broken"):
        loop.run(all_of([wait(60, "long"), fail()]))
    assert cancelled == ["long"]
    loop.close()


def test_work_that_comes_while_an_engine_ends_is_refused_and_does_not_wait_for_ever() -> None:
    """As of a thread that draws ahead, and grades or makes its requests when the run fails."""
    loop = LoopThread()
    told: list[BaseException] = []
    ending = threading.Event()

    def work(start: threading.Event) -> None:
        start.wait(5)
        try:
            loop.run(asyncio.sleep(60))
        except BaseException as error:
            told.append(error)

    running = threading.Thread(target=work, args=[go := threading.Event()], daemon=True)
    late = threading.Thread(target=work, args=[ending], daemon=True)
    for thread in (running, late):
        thread.start()
    go.set()
    time.sleep(0.05)
    loop.end_tasks()
    running.join(5)
    ending.set()
    late.join(5)
    loop.close()
    assert not running.is_alive()
    assert not late.is_alive()
    assert [type(error) for error in told] == [CancelledError, WorkError]


def test_ctrl_c_cancels_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopThread()
    ended = threading.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def interrupted(self: Any, timeout: float | None = None) -> None:
        time.sleep(0.05)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run(long())
    assert ended.wait(5)
    loop.close()
