"""`gpt-ext serve` as its users meet it: OpenAI's client, wrong requests, limits, and its end."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import openai
import pytest
import torch

from gpt_ext import GPT, pretrained
from gpt_ext.tokenizer import Tokenizer
from tests.serve.server import Server, make_run, wait_until

# What uvicorn says of a response that a stalled reader did not take.
STALLED = "ERROR:    ASGI callable returned without completing response."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("serve"), context_length=32, model_dim=16, num_blocks=1, num_heads=2
    )


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    server = Server(run, "--max-tokens", "100000", "--slots", "8", "--max-body", "10000")
    yield server
    code, errors = server.stop()
    assert code == 0
    assert set(errors.splitlines()) <= {STALLED}


@pytest.fixture(scope="module")
def narrow(run: Path) -> Iterator[Server]:
    """A server of one slot, one place in the queue, a second's time, and a token."""
    options = ("--slots", "1", "--queue", "1", "--timeout", "1", "--token", "secret")
    server = Server(run, *options, "--host", "0.0.0.0", "--max-tokens", "10000000")
    yield server
    assert server.stop() == (0, "")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(run: Path) -> tuple[GPT, Tokenizer]:
    model, tokenizer = pretrained.load(run)
    assert tokenizer is not None
    return model, tokenizer


def alone(model: tuple[GPT, Tokenizer], prompt: str, new: int, seed: int, **options: Any) -> str:
    """What GPT.generate writes for the seed."""
    gpt, tokenizer = model
    tokens = gpt.generate(
        tokenizer.encode(prompt)[None], new, overflow="reprefill",
        generator=torch.Generator().manual_seed(seed), **options,
    )[0]  # fmt: skip
    return tokenizer.decode(tokens[len(prompt) :])


def test_openais_client_gets_the_text_of_generate_whole_and_streamed(
    client: openai.OpenAI, model: tuple[GPT, Tokenizer]
) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
    expected = alone(model, "the king", 500, 7, top_k=20, **options)
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "the king", "max_tokens": 500, "seed": 7,
        "extra_body": {"top_k": 20}, **options,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 500)
    *events, last = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(event.choices[0].text for event in events) == expected
    assert [event.choices[0].finish_reason for event in events][-1] == "length"
    assert (last.choices, last.usage) == ([], whole.usage)


def test_choices_are_prompts_times_n_each_with_a_seed_of_its_own(
    client: openai.OpenAI, model: tuple[GPT, Tokenizer]
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "seed": 3, "n": 2}
    prompts = ["fox", "a river"]
    answer = client.completions.create(prompt=prompts, **asked)
    texts = [choice.text for choice in answer.choices]
    assert texts == [alone(model, prompts[i // 2], 40, 3 + i) for i in range(4)]
    ids = [model[1].encode(prompt).tolist() for prompt in prompts]
    again = client.completions.create(prompt=ids, **asked)
    assert [choice.text for choice in again.choices] == texts
    one = client.completions.create(prompt=ids[0], **asked, echo=True)
    assert [choice.text for choice in one.choices] == ["fox" + text for text in texts[:2]]
    streamed = [""] * 4
    for event in client.completions.create(prompt=prompts, **asked, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(
    client: openai.OpenAI, model: tuple[GPT, Tokenizer], stream: bool
) -> None:
    text = alone(model, "a", 300, 5)
    stop = [text[200:203], text[120:124]]
    expected = text[: min(text.find(each) for each in stop)]
    answer: Any = client.completions.create(
        model="tiny", prompt="a", max_tokens=300, seed=5, stop=stop, stream=stream
    )
    choices = [each.choices[0] for each in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == expected
    assert choices[-1].finish_reason == "stop"


def test_logprobs_are_the_models(client: openai.OpenAI, model: tuple[GPT, Tokenizer]) -> None:
    gpt, tokenizer = model
    answer = client.completions.create(
        model="tiny", prompt="fox", max_tokens=20, seed=1, logprobs=3, temperature=0.5
    ).choices[0]
    assert answer.text == alone(model, "fox", 20, 1, temperature=0.5)
    told = answer.logprobs
    assert told is not None
    assert told.tokens == list(answer.text)
    assert told.text_offset == list(range(20))
    text = tokenizer.encode("fox" + answer.text)
    with torch.no_grad():
        expected = gpt(text[None, :-1])[0, 2:].log_softmax(-1)
    drawn = expected[torch.arange(20), text[3:]]
    torch.testing.assert_close(torch.tensor(told.token_logprobs), drawn, rtol=0, atol=1e-4)
    for likeliest, row in zip(told.top_logprobs or [], expected, strict=True):
        values, ids = row.topk(3)
        assert list(likeliest) == list(tokenizer.decode(ids))
        torch.testing.assert_close(torch.tensor([*likeliest.values()]), values, rtol=0, atol=1e-4)


def test_a_thousand_requests_at_once_get_the_text_they_get_alone(
    server: Server, model: tuple[GPT, Tokenizer]
) -> None:
    draw = random.Random(0)
    jobs = [(draw.choice(["a", "the fox", "king" * 8]), draw.randint(1, 60), i) for i in range(50)]
    expected = [alone(model, *job) for job in jobs]

    def ask(number: int) -> None:
        prompt, new, seed = jobs[number % 50]
        status, answer = server.complete(prompt=prompt, max_tokens=new, seed=seed)
        assert status == 200, answer
        assert answer["choices"][0]["text"] == expected[number % 50]

    with ThreadPoolExecutor(32) as clients:
        list(clients.map(ask, range(300)))  # warms up
        before = server.memory()
        list(clients.map(ask, range(1000)))
    assert server.memory() < before + 8e6
    assert server.running() == 0


def test_a_stream_that_lags_behind_tells_the_end_once(server: Server) -> None:
    def ends(seed: int) -> int:
        _, text = server.complete(max_tokens=60, seed=seed, stream=True)
        return sum('"finish_reason": "length"' in line for line in text.splitlines())

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ends, range(64))) == [1] * 64


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        (b'{"prompt": "a"', 400, "the body is not JSON"),
        (b"\xff\xfe\xfa", 400, "the body is not JSON"),
        (b"[" * 9000, 400, "the body is not JSON"),
        ([], 400, "the body must be a JSON object, got an array"),
        (b"x" * 10_001, 413, "the body must be of at most 10000 bytes"),
        ({}, 400, "prompt must be a string"),
        ({"prompt": 3}, 400, "prompt must be a string"),
        ({"prompt": ["a", 3]}, 400, "prompt must be a string"),
        ({"prompt": []}, 400, "prompt must be a string"),
        ({"prompt": ""}, 400, "a prompt must be of 1 to 32 tokens, got 0"),
        ({"prompt": "a" * 33}, 400, "a prompt must be of 1 to 32 tokens, got 33"),
        ({"prompt": "fóx"}, 400, "character 'ó' at position 1"),
        ({"prompt": [32]}, 400, "token id 32 is outside the vocabulary, 0 to 31"),
        ({"prompt": ["a"] * 9}, 400, "9 prompts are more than 8 choices"),
        ({"prompt": ["a"] * 3, "n": 3}, 400, "3 prompts times n=3 are more than 8 choices"),
        ({"prompt": "a", "n": 0}, 400, "n must be an integer from 1 to 8, got 0"),
        ({"prompt": "a", "max_tokens": 100_001}, 400, "max_tokens must be an integer from 1 to"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens must be .*, got a boolean"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature must be a number, got a string"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature must be finite and not negative"),
        ({"prompt": "a", "temperature": 10**400}, 400, "temperature must be finite and not neg"),
        (b'{"prompt": "a", "\\ud800": 1}', 400, ". is not supported"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature must be finite"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p must be above 0 and at most 1"),
        ({"prompt": "a", "top_k": 0}, 400, "top_k must be an integer from 1"),
        ({"prompt": "a", "seed": 1.5}, 400, "seed must be an integer"),
        ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop must be a string or up to 4 strings"),
        ({"prompt": "a", "stop": ""}, 400, "stop must be a string or up to 4 strings"),
        ({"prompt": "a", "logprobs": 6}, 400, "logprobs must be an integer from 0 to 5, got 6"),
        ({"prompt": "a", "stream": 1}, 400, "stream must be true or false, got a number"),
        ({"prompt": "a", "best_of": 2}, 400, "best_of is not supported, got 2"),
        ({"prompt": "a", "tools": []}, 400, "tools is not supported"),
        ({"prompt": "a", "model": "gpt-5"}, 404, "the model is 'tiny', got 'gpt-5'"),
    ],
)
def test_wrong_requests_are_told(server: Server, fields: Any, status: int, message: str) -> None:
    got, answer = server.request("/v1/completions", fields)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer["error"]["message"])


def test_unknown_paths_and_methods_are_told_in_openais_form(server: Server) -> None:
    assert server.request("/v1/none")[0] == 404
    status, answer = server.request("/v1/completions")
    assert status == 405
    assert "GET /v1/completions" in answer["error"]["message"]


def test_a_closed_connection_frees_its_slots(server: Server) -> None:
    for stream in (False, True):
        connection = server.open(max_tokens=100_000, n=8, stream=stream)
        wait_until(lambda: server.running() == 8, 5)
        connection.close()
        wait_until(lambda: server.running() == 0, 1)


def test_a_reader_that_stalls_holds_up_nobody_and_loses_its_slots(server: Server) -> None:
    gone = server.metrics()["gpt_ext_disconnects_total"]
    with server.open(max_tokens=100_000, n=7, stream=True):
        wait_until(lambda: server.running() == 7, 5)
        assert server.complete(max_tokens=50)[0] == 200
        wait_until(lambda: server.metrics()["gpt_ext_disconnects_total"] > gone, 20)
        wait_until(lambda: server.running() == 0, 1)


BEARER = {"Authorization": "Bearer secret"}


def test_only_who_knows_the_token_is_served(narrow: Server) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
        status, answer = narrow.request("/v1/completions", body, headers)
        assert status == 401
        assert "a token is needed" in answer["error"]["message"]
    assert narrow.request("/metrics")[0] == 401
    assert narrow.request("/health") == (200, {"status": "ok"})
    assert narrow.request("/v1/completions", body, BEARER)[0] == 200


def test_a_request_has_so_much_time_and_the_queue_so_much_room(narrow: Server) -> None:
    def ask(stream: bool) -> tuple[int, Any]:
        body = {"prompt": "a", "max_tokens": 10_000_000, "stream": stream}
        return narrow.request("/v1/completions", body, BEARER)

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, [False] * 8))
    statuses = sorted(status for status, _ in answers)
    assert statuses == [429] * 6 + [503] * 2
    messages = {status: answer["error"]["message"] for status, answer in answers}
    assert messages == {
        429: "too many requests are waiting; try again later",
        503: "the request took more than 1 s",
    }
    status, text = ask(True)  # an answer that has begun
    assert status == 200
    assert text.rstrip().splitlines()[-1].startswith('data: {"error": {"message": "the request to')


def test_sigterm_lets_what_is_under_way_finish_and_begins_nothing(run: Path) -> None:
    server = Server(run, "--max-tokens", "1000000")
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(server.complete, max_tokens=10_000, seed=1)
        wait_until(lambda: server.running() == 1, 5)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.request("/health")[0] == 503, 5)
        status, answer = server.complete(max_tokens=1)
        assert (status, answer["error"]["message"]) == (503, "the server is closing")
        status, answer = first.result()
        assert status == 200
        assert len(answer["choices"][0]["text"]) == 10_000
    _, errors = server.process.communicate(timeout=10)
    assert (server.process.returncode, errors) == (0, "")


def test_after_the_grace_the_rest_is_ended(run: Path) -> None:
    server = Server(run, "--max-tokens", "100000000", "--grace", "0.3")
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.complete, max_tokens=100_000_000)
        wait_until(lambda: server.running() == 1, 5)
        stream = clients.submit(server.complete, max_tokens=100_000_000, stream=True)
        wait_until(lambda: server.running() == 2, 5)
        assert server.stop() == (0, "")
        status, answer = first.result()
        assert (status, answer["error"]["message"]) == (500, "the engine failed or was stopped")
        status, text = stream.result()
        assert status == 200
        assert text.rstrip().splitlines()[-1].startswith('data: {"error": {"message": "the engine')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others: --token is needed"),
        (["--slots", "0"], "slots must be above 0, got 0"),
        (["--port", "70000"], "port must be from 0 to 65535, got 70000"),
    ],
)
def test_what_cannot_be_served_is_told(run: Path, options: list[str], message: str) -> None:
    import child

    done = child.run(["serve", str(run), *options])
    assert (done.returncode, done.stderr) == (2, f"gpt-ext: error: {message}\n")


def test_without_starlette_the_extra_is_named(run: Path) -> None:
    code = "import sys; sys.modules['starlette'] = None; from gpt_ext.cli import main; "
    code += f"sys.exit(main(['serve', {str(run)!r}]))"
    done = run_process([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'gpt-ext[serve]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
