"""Answers to completions whose tokens are no characters."""

from __future__ import annotations

from pathlib import Path

import torch
from starlette.testclient import TestClient

from gpt_ext import GPT
from gpt_ext.serve.app import create_app
from gpt_ext.tokenizer import ByteTokenizer


def test_tokens_that_are_half_a_character(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = GPT(300, 16, 16, 1, 2, dropout=0.0), ByteTokenizer()
    model.save_pretrained(tmp_path, tokenizer)
    app = create_app(model, tokenizer, tmp_path)
    with TestClient(app) as client:
        for seed in range(8):
            asked = {"prompt": "w\u00f6r", "seed": seed, "logprobs": 5, "max_tokens": 12}
            answer = client.post("/v1/completions", json=asked).json()["choices"][0]
            new = model.generate(
                tokenizer.encode("w\u00f6r")[None], 12, overflow="reprefill",
                generator=torch.Generator().manual_seed(seed),
            )[0, 4:]  # fmt: skip
            if int(new.max()) < 256:  # else the tokenizer can't decode all of them
                assert answer["text"] == tokenizer.decode(new)
            for drawn, likeliest in zip(
                answer["logprobs"]["token_logprobs"],
                answer["logprobs"]["top_logprobs"],
                strict=True,
            ):
                assert max(likeliest.values()) >= drawn
        asked = {"prompt": [299, 97], "echo": True, "max_tokens": 1}
        answer = client.post("/v1/completions", json=asked).json()["choices"][0]
        assert answer["text"].startswith("\ufffda")
