"""`gpt-ext serve` in a process of its own, and raw HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families

from gpt_ext import GPT, checkpoint
from gpt_ext.options import ModelOptions, TrainOptions
from gpt_ext.tokenizer import CharTokenizer, Tokenizer

VOCABULARY = "\n abcdefghijklmnopqrstuvwxyz.,!?"


CHARACTERS = CharTokenizer(VOCABULARY)


def make_run(folder: Path, tokenizer: Tokenizer = CHARACTERS, **model: Any) -> Path:
    """A run whose model has random weights."""
    torch.manual_seed(0)
    sizes = asdict(ModelOptions(**model))
    run = folder / "tiny"
    vocabulary = len(tokenizer)
    config = {"vocab_size": vocabulary, "model": sizes, "train": asdict(TrainOptions())}
    checkpoint.create_run(run, config | {"data": "none", "data_sha256": ""}, tokenizer)
    checkpoint.save_weights(run / checkpoint.BEST, GPT(vocabulary, **sizes).state_dict())
    return run


class Server:
    """A server of a run; requests by http.client, so that anything can be asked."""

    def __init__(self, run: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt_ext", "serve", str(run), "--port", "0", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving on http://"), self.process.communicate()
        self.port = int(line.rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def request(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and content; a body is sent as it is if it is bytes, else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, content, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        as_json = response.headers["content-type"] == "application/json"
        return response.status, json.loads(text) if as_json else text

    def complete(self, **fields: Any) -> tuple[int, Any]:
        return self.request("/v1/completions", {"prompt": "a", **fields})

    def open(self, **fields: Any) -> socket.socket:
        """A connection on which a completion has been asked for."""
        body = json.dumps({"prompt": "a", **fields}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(head.encode() + body)
        return connection

    def metrics(self) -> dict[str, float]:
        """The samples without labels."""
        _, text = self.request("/metrics")
        families = text_string_to_metric_families(text)
        return {s.name: s.value for family in families for s in family.samples if not s.labels}

    def running(self) -> float:
        return self.metrics()["gpt_ext_sequences_running"]

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> tuple[int, str]:
        """SIGTERM; its exit code and what it said on stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
