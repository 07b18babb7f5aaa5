"""While text is written, or weights are packed: other threads run, and Ctrl-C is seen."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpt_ext import GPT, engine, sequences
from gpt_ext.ops import decode


@pytest.mark.parametrize("name", ["pack", "generate"])
def test_ctrl_c_is_seen_during_a_long_call(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = GPT(5, 8, 8, 1, 1)
    op, begun, ended = getattr(decode, name), threading.Event(), threading.Event()

    def slow_op(*arguments: Any, **options: Any) -> Any:
        begun.set()
        try:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # native, as the op is
            return op(*arguments, **options)
        finally:
            ended.set()

    def interrupt() -> None:
        begun.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    monkeypatch.setattr(decode, name, slow_op)
    monkeypatch.setattr(sequences, "CALL_FLOPS", 24 * 8**2)  # of two rows' tokens it is more
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.zeros(2, 1, dtype=torch.int64), 3)
    assert not ended.is_set()
    ended.wait()


def test_an_error_in_packing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> torch.Tensor:
        raise MemoryError("too large")

    monkeypatch.setattr(decode, "pack", no_memory)
    with pytest.raises(MemoryError, match="too large"):
        GPT(5, 8, 8, 1, 1).generate(torch.zeros(1, 1, dtype=torch.int64), 3)


def test_a_thread_has_one_helper_while_it_lives() -> None:
    helpers: list[threading.Thread] = []

    def run() -> None:
        helpers.extend(engine.interruptibly(threading.current_thread) for _ in range(2))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert helpers[0] is helpers[1] is not engine.interruptibly(threading.current_thread)
    helpers[0].join(timeout=10)
    assert not helpers[0].is_alive()


def test_the_helper_hears_of_set_num_threads() -> None:
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        assert engine.interruptibly(torch.get_num_threads) == count
    torch.set_num_threads(before)


def test_other_threads_run_meanwhile_and_calls_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(50, 512, 256, 4, 4).eval()
    calls: list[float] = []

    def timed(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            result = op(*arguments, **options)
            calls.append(time.thread_time() - start)
            return result

        return call

    monkeypatch.setattr(decode, "generate", timed(decode.generate))
    monkeypatch.setattr(decode, "forward", timed(decode.forward))
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    model.generate(torch.randint(50, (1, 512)), 4)
    done.set()
    thread.join()
    assert ticks > 20
    assert len(calls) > 8, "the prompt is to take several calls"
