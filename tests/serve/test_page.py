"""The page's files, and its API: the facts of the model, its losses, and its sight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gpt_ext import GPT, checkpoint, plots, pretrained
from gpt_ext.serve import page
from gpt_ext.serve.app import create_app
from gpt_ext.tokenizer import ByteTokenizer, Tokenizer
from tests.serve.server import VOCABULARY, make_run

CONTEXT = 16
TEXT = "what stands here, and what could have?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(context_length=CONTEXT, model_dim=16, num_blocks=2, num_heads=2)
    return make_run(tmp_path_factory.mktemp("page"), **sizes)


@pytest.fixture(scope="module")
def loaded(run: Path) -> tuple[GPT, Tokenizer]:
    model, tokenizer = pretrained.load(run)
    assert tokenizer is not None
    return model, tokenizer


@pytest.fixture(scope="module")
def client(run: Path, loaded: tuple[GPT, Tokenizer]) -> TestClient:
    return TestClient(create_app(*loaded, run))


def look(client: TestClient, text: Any, position: Any) -> Any:
    response = client.post("/api/look", json={"text": text, "position": position})
    assert response.status_code == 200, response.text
    return response.json()


def test_every_file_is_there_and_may_ask_no_other_origin(client: TestClient) -> None:
    for path in ["/", *(f"/static/{file.name}" for file in page.STATIC.iterdir())]:
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == "default-src 'self'"
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert "javascript" in client.get("/static/page.js").headers["content-type"]
    for path in ("/static/none.js", "/static/..%2fpage.py"):
        assert client.get(path).status_code == 404


def test_model_is_described(client: TestClient) -> None:
    assert client.get("/api/model").json() == {
        "name": "tiny", "context": CONTEXT, "layers": 2, "heads": 2,
        "vocabulary": len(VOCABULARY), "unit": "character",
    }  # fmt: skip


def test_losses_are_those_of_the_run(client: TestClient, run: Path) -> None:
    assert client.get("/api/losses").json() == {"train": [], "validation": []}
    metrics = run / checkpoint.METRICS
    for step in range(1, 2502):
        checkpoint.append_line(metrics, {"step": step, "loss": None if step == 1 else 1 / step})
    checkpoint.append_line(metrics, {"step": 2501, "validation_loss": 0.5})
    losses = client.get("/api/losses").json()
    metrics.unlink()
    assert losses["validation"] == [[2501, 0.5]]
    assert losses["train"][0] == [2, 0.5]
    assert 500 < len(losses["train"]) <= 1000


@pytest.mark.parametrize(("position", "start"), [(1, 0), (CONTEXT, 0), (30, 30 - CONTEXT)])
def test_look_is_what_the_model_thought(
    client: TestClient, loaded: tuple[GPT, Tokenizer], position: int, start: int
) -> None:
    model, tokenizer = loaded
    answer = look(client, TEXT, position)
    seen = tokenizer.encode(TEXT[start:position])
    with torch.no_grad():
        expected = model(seen[None])[0, -1].softmax(-1)
    assert "".join(answer["pieces"]) == TEXT
    assert (answer["start"], answer["position"]) == (start, position)
    values, tokens = expected.topk(12)
    assert [each["text"] for each in answer["likeliest"]] == [VOCABULARY[t] for t in tokens]
    assert [each["probability"] for each in answer["likeliest"]] == pytest.approx(values.tolist())
    chosen = expected[VOCABULARY.index(TEXT[position])]
    assert answer["chosen"] == {
        "text": TEXT[position], "probability": pytest.approx(chosen.item()),
        "rank": int((expected > chosen).sum()) + 1,
    }  # fmt: skip
    weights = plots.attention_weights(model, seen)[:, :, -1]
    torch.testing.assert_close(torch.tensor(answer["attention"]), weights)


def test_pieces_are_tokens_where_these_are_no_characters(tmp_path: Path) -> None:
    model = GPT(300, 8, 16, 1, 2)  # more tokens than the vocabulary has
    client = TestClient(Starlette(routes=page.routes(model, ByteTokenizer(), tmp_path)))
    assert client.get("/api/model").json()["unit"] == "token"
    answer = look(client, "aé!", 2)
    assert answer["pieces"] == ["a", "", "é", "!"]
    assert answer["chosen"]["rank"] >= 1


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "the body is not JSON"),
        (b"[]", 400, None, "must be a JSON object"),
        (b'{"position": 1}', 400, "text", "text must be a string"),
        (b'{"text": "abc", "position": true}', 400, "position", "must be an integer"),
        (b'{"text": "abc", "position": 0}', 400, "position", "nothing comes before"),
        (b'{"text": "abc", "position": 3}', 400, "position", "from 1 to 2, got 3"),
        (b'{"text": "aBc", "position": 1}', 400, "text", "'B' at position 1"),
        (b'{"text": "a\\ud800", "position": 1}', 400, "text", "is not among"),
        (b" " * (page.MAX_BODY + 1), 413, None, "at most 1048576 bytes"),
    ],
)
def test_wrong_looks_are_told_what_is_wrong(
    client: TestClient, body: bytes, status: int, param: str | None, message: str
) -> None:
    response = client.post("/api/look", content=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == param


def test_token_guards_the_model_and_not_the_page(run: Path, loaded: tuple[GPT, Tokenizer]) -> None:
    client = TestClient(create_app(*loaded, run, token="secret"))
    content = json.dumps({"text": "abc", "position": 1})
    for path in ("/", "/static/page.js", "/static/page.css"):
        assert client.get(path).status_code == 200
    for path in ("/api/model", "/api/losses"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.post("/api/look", content=content).status_code == 401
