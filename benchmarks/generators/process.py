"""A contestant of bench_generate.py in a process of its own: its threads, and its crashes."""

from __future__ import annotations

import multiprocessing
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from contest import first_line
from models import build

from generators import ENTRIES
from gpt_ext import GPT, GPTConfig

Tokens = list[list[int]]


def random_model(config: GPTConfig) -> GPT:
    """The same for everybody; without a vocabulary bias, for which GPT-2's format has no place."""
    torch.manual_seed(0)
    model = build(config).eval()
    torch.nn.init.zeros_(model.vocab_projection.bias)
    return model


def serve(connection: Connection, name: str, config: GPTConfig, batch: int, threads: int) -> None:
    """Answers with the seconds a call and the tokens, until a request (prompt, new, repeats) is
    None. The first answer is None; why something can't be is a string.
    """
    torch.set_num_threads(threads)
    try:
        generator = ENTRIES[name].make(random_model(config), batch)
        connection.send(None)
        while (request := connection.recv()) is not None:
            prompt, new, repeats = request
            tokens = torch.tensor(prompt)
            start = time.perf_counter()
            for _ in range(repeats):
                generated = generator.generate(tokens, new)
            connection.send(((time.perf_counter() - start) / repeats, generated.tolist()))
    except Exception as error:  # whatever a package that does not fit this machine throws
        connection.send(first_line(error))


class Contestant:
    """Starts the process and waits until it is ready. RuntimeError says why something can't be."""

    def __init__(self, name: str, config: GPTConfig, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        arguments = (there, name, config, batch, torch.get_num_threads())
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        there.close()
        self.receive()

    def receive(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            answer = f"its process ended with {self.process.exitcode}"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def generate(self, prompt: Tokens, new: int, repeats: int = 1) -> tuple[float, Tokens]:
        """Seconds a call over `repeats` of them, and the `new` tokens of each row."""
        self.connection.send((prompt, new, repeats))
        seconds, tokens = self.receive()
        return seconds, tokens

    def stop(self) -> None:
        with suppress(BrokenPipeError):  # it may have ended by itself
            self.connection.send(None)
        self.process.join()
