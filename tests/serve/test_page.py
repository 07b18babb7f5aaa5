"""The page's files, and what they ask: facts of the model, its losses, and what it sees."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gpt_ext import GPT, checkpoint, plots, pretrained
from gpt_ext.bpe import BPETokenizer
from gpt_ext.serve import page
from gpt_ext.serve.app import create_app
from gpt_ext.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from tests.serve.server import VOCABULARY, make_run

CONTEXT = 16
TEXT = "what stands here, and what could have?"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg"}


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


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Files of a page, in the place of ours."""
    files = {name: tmp_path / name for name in ("index.html", "page.css", "page.js", "icon.svg")}
    for name, path in files.items():
        path.write_text(f"content of {name}")
    (tmp_path / "secret.txt").write_text("not of the page")
    monkeypatch.setattr(page, "FILES", files)
    return files


def client_of(model: GPT, tokenizer: Tokenizer, run: Path) -> TestClient:
    """The page alone."""
    return TestClient(Starlette(routes=page.routes(model, tokenizer, run)))


def look(client: TestClient, text: Any, position: Any) -> Any:
    response = client.post("/api/look", json={"text": text, "position": position})
    assert response.status_code == 200, response.text
    return response.json()


def test_files_come_with_their_types(client: TestClient, files: dict[str, Path]) -> None:
    paths = {"/": "index.html"} | {f"/static/{name}": name for name in files}
    for path, name in paths.items():
        response = client.get(path)
        assert response.text == f"content of {name}"
        assert response.headers["content-type"].startswith(TYPES[Path(name).suffix])
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", ["none.js", "", "secret.txt", "..%2fpage.py", "%2e%2e/page.py"])
def test_no_other_file_is_given(client: TestClient, name: str) -> None:
    response = client.get(f"/static/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["message"].startswith("there is no /static/")


def test_page_asks_for_what_is_there_and_no_other_origin() -> None:
    assert "index.html" in page.FILES
    for path in page.FILES.values():
        content = path.read_text()
        assert set(re.findall(r'"/static/([^"]*)"', content)) <= page.FILES.keys()
        origins = set(re.findall(r"https?://[^/\"']*", content))
        assert origins <= {"http://www.w3.org"}  # the name of SVG


@pytest.mark.usefixtures("files")
def test_every_answer_has_the_policy(client: TestClient) -> None:
    content = {"text": "abc", "position": 1}
    answers = [client.get(path) for path in ("/", "/static/page.js", "/static/none.js")]
    answers += [client.get(path) for path in ("/api/model", "/api/losses")]
    answers += [client.post("/api/look", json=content), client.post("/api/look")]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 200, 200, 400]
    policies = {answer.headers["content-security-policy"] for answer in answers}
    assert policies == {"default-src 'self'"}


def test_model_is_described(client: TestClient) -> None:
    assert client.get("/api/model").json() == {
        "name": "tiny", "context": CONTEXT, "layers": 2, "heads": 2,
        "vocabulary": len(VOCABULARY), "unit": "character",
    }  # fmt: skip


def test_losses_are_those_of_the_run(client: TestClient, run: Path) -> None:
    assert client.get("/api/losses").json() == {"train": [], "validation": []}
    metrics = run / checkpoint.METRICS
    records = [{"step": n, "loss": None if n == 1 else 1 / n} for n in range(1, 2502)]
    records.append({"step": 2501, "validation_loss": 0.5})
    metrics.write_text("".join(map(checkpoint.json_line, records)))
    losses = client.get("/api/losses").json()
    metrics.unlink()
    assert losses["validation"] == [[2501, 0.5]]
    assert losses["train"][0] == [2, 0.5]
    assert 500 < len(losses["train"]) <= 1000
    assert all(loss == 1 / step for step, loss in losses["train"])


@pytest.mark.parametrize(("position", "start"), [(1, 0), (CONTEXT, 0), (30, 30 - CONTEXT)])
def test_look_is_what_the_model_thought(
    client: TestClient, loaded: tuple[GPT, Tokenizer], position: int, start: int
) -> None:
    model, tokenizer = loaded
    answer = look(client, TEXT, position)
    seen = tokenizer.encode(TEXT[start:position])
    with torch.no_grad():
        expected = model(seen[None])[0, -1].double().softmax(-1)
    assert answer["pieces"] == list(TEXT)
    assert (answer["start"], answer["position"]) == (start, position)
    values, tokens = expected.topk(12)
    assert [each["text"] for each in answer["likeliest"]] == [VOCABULARY[t] for t in tokens]
    given = [each["probability"] for each in answer["likeliest"]]
    assert given == pytest.approx(values.tolist(), rel=1e-5)
    chosen = expected[VOCABULARY.index(TEXT[position])]
    assert answer["chosen"] == {
        "text": TEXT[position], "probability": pytest.approx(chosen.item(), rel=1e-5),
        "rank": int((expected > chosen).sum()) + 1,
    }  # fmt: skip
    attention = torch.tensor(answer["attention"])
    torch.testing.assert_close(attention, plots.attention_weights(model, seen)[:, :, -1])
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2))


def test_vocabulary_may_be_smaller_than_what_is_told(tmp_path: Path) -> None:
    answer = look(client_of(GPT(3, 8, 16, 1, 2), CharTokenizer("abc"), tmp_path), "abcabc", 4)
    assert {each["text"] for each in answer["likeliest"]} == set("abc")
    assert sum(each["probability"] for each in answer["likeliest"]) == pytest.approx(1)


def test_a_piece_has_the_characters_that_its_byte_completes(tmp_path: Path) -> None:
    model = GPT(300, 8, 16, 1, 2)  # more tokens than the vocabulary has
    client = client_of(model, ByteTokenizer(), tmp_path)
    assert client.get("/api/model").json()["unit"] == "token"
    answer = look(client, "aé!", 2)
    assert answer["pieces"] == ["a", "", "é", "!"]
    assert 1 <= answer["chosen"]["rank"] <= 300


def test_positions_are_those_of_tokens(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(iter(["the cat sat on the mat "] * 9), 280)
    client = client_of(GPT(len(tokenizer), 8, 16, 1, 2), tokenizer, tmp_path)
    text = "the cat sat é on the mat"
    tokens = tokenizer.encode(text)
    assert len(tokens) < len(text)
    answer = look(client, text, len(tokens) - 1)
    assert len(answer["pieces"]) == len(tokens)
    assert "".join(answer["pieces"]) == text
    assert answer["chosen"]["text"] == tokenizer.decode(tokens[-1:])
    for rest in ("\ufffd", "\ufffd\ufffd"):  # which a decoder may take for half a character
        assert "".join(look(client, text + rest, 1)["pieces"]) == text + rest
    response = client.post("/api/look", json={"text": text, "position": len(tokens)})
    assert f"one of the {len(tokens)} tokens" in response.json()["error"]["message"]
    response = client.post("/api/look", content=rb'{"text": "the \ud800", "position": 1}')
    assert response.status_code == 400
    assert "surrogates not allowed" in response.json()["error"]["message"]


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    model = GPT(3, 8, 16, 1, 2)
    torch.nn.init.constant_(model.final_norm.weight, torch.nan)
    client = client_of(model, CharTokenizer("abc"), tmp_path)
    response = client.post("/api/look", json={"text": "abc", "position": 1})
    assert response.status_code == 500
    assert "its weights are damaged" in response.json()["error"]["message"]


def test_tokens_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    client = client_of(GPT(100, 8, 16, 1, 2), ByteTokenizer(), tmp_path)
    response = client.post("/api/look", json={"text": "az", "position": 1})
    assert response.status_code == 400
    assert "token id 122 is beyond the model's 100 tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "the body is not JSON"),
        (b"\xff", 400, None, "the body is not JSON"),
        (b"[" * 100_000, 400, None, "the body is not JSON"),
        (b"[]", 400, None, "must be a JSON object, got an array"),
        (b'{"position": 1}', 400, "text", "text must be a string, got null"),
        (b'{"text": ["a"], "position": 1}', 400, "text", "text must be a string, got an array"),
        (b'{"text": "abc"}', 400, "position", "must be an integer, got null"),
        (b'{"text": "abc", "position": true}', 400, "position", "an integer, got a boolean"),
        (b'{"text": "abc", "position": 1.5}', 400, "position", "an integer, got 1.5"),
        (b'{"text": "abc", "position": 0}', 400, "position", "sees nothing before the first"),
        (b'{"text": "abc", "position": -1}', 400, "position", "one of the 3 tokens, got -1"),
        (b'{"text": "abc", "position": 3}', 400, "position", "one of the 3 tokens, got 3"),
        (b'{"text": "", "position": 1}', 400, "position", "one of the 0 tokens, got 1"),
        (b'{"text": "aBc", "position": 1}', 400, "text", "text: character 'B' at position 1"),
        (b'{"text": "a\\ud800", "position": 1}', 400, "text", "is not among"),
        (b" " * (page.MAX_BODY + 1), 413, None, "at most 1048576 bytes"),
    ],
)
def test_wrong_looks_are_told_what_is_wrong(
    client: TestClient, body: bytes, status: int, param: str | None, message: str
) -> None:
    response = client.post("/api/look", content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, None)


def test_looks_leave_the_server_free_and_wait_for_each_other(
    run: Path, loaded: tuple[GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, alone = threading.Event(), threading.Event(), threading.Lock()

    def read(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with_others = not alone.acquire(blocking=False)
        begun.set()
        assert go_on.wait(30)
        assert not with_others
        alone.release()
        return plots.read(*arguments)

    monkeypatch.setattr(page, "read", read)
    with TestClient(create_app(*loaded, run)) as client, ThreadPoolExecutor() as pool:
        answers = [pool.submit(look, client, TEXT, position) for position in (3, 4, 5)]
        assert begun.wait(30)
        assert client.get("/health").json() == {"status": "ok"}
        go_on.set()
        assert [answer.result()["position"] for answer in answers] == [3, 4, 5]


@pytest.mark.usefixtures("files")
def test_token_guards_the_model_and_not_the_page(run: Path, loaded: tuple[GPT, Tokenizer]) -> None:
    client = TestClient(create_app(*loaded, run, token="secret"))
    content = json.dumps({"text": "abc", "position": 1})

    def statuses(**headers: str) -> list[int]:
        answers = [client.get(p, headers=headers) for p in ("/api/model", "/api/losses")]
        answers.append(client.post("/api/look", content=content, headers=headers))
        return [answer.status_code for answer in answers]

    for path in ("/", "/static/page.js", "/static/page.css", "/health"):
        assert client.get(path).status_code == 200
    assert statuses() == statuses(Authorization="Bearer other") == [401] * 3
    assert statuses(Authorization="Bearer secret") == [200] * 3
    for path in ("/v1/models", "/metrics", "/api/none", "/static"):
        assert client.get(path).status_code == 401
    assert client.get("/static/..%2fapi/model").status_code == 404
