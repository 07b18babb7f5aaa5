"""OpenAI's /v1/completions: what a request may ask for, and the JSON that answers it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gpt_ext.checks import number
from gpt_ext.generation import check_sampling
from gpt_ext.sequences import Sampling
from gpt_ext.serve.scheduler import Progress, Ticket, TokenLogprobs
from gpt_ext.tokenizer import Tokenizer, piece_of

MAX_STOPS, MAX_LOGPROBS = 4, 5  # OpenAI's own limits
DEFAULT_MAX_TOKENS = 16
# Accepted where they ask for nothing: what a client sends by default.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "suffix": ("",),
}  # fmt: skip
KNOWN = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n",
    "logprobs", "echo", "stream", "stream_options", "user", *NEUTRAL,
}  # fmt: skip


class ApiError(Exception):
    """An error that is told in OpenAI's form, with its HTTP status."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for at most."""

    context: int  # tokens of a prompt
    max_tokens: int  # tokens of an answer
    choices: int  # prompts times n
    vocab: int  # of the model


@dataclass(frozen=True)
class Completion:
    """A request, checked: its prompts' tokens, and how each is to be gone on with."""

    prompts: list[list[int]]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: list[str]
    n: int
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool

    def tickets(self, deliver: Callable[[int], Callable[[Progress], None]]) -> list[Ticket]:
        """The sequences, choice by choice; choice i draws from a generator of seed + i."""
        return [
            Ticket(
                self.prompts[i // self.n], self.max_tokens, self.sampling,
                torch.Generator().manual_seed((self.seed + i) % 2**63),
                self.logprobs, deliver(i),
            )
            for i in range(len(self.prompts) * self.n)
        ]  # fmt: skip


def parse(body: bytes, tokenizer: Tokenizer, model: str, limits: Limits) -> Completion:
    """The request of a body; ApiError 400, or 404 for another model, says what is wrong."""
    fields = object_of(body)
    for name, value in fields.items():
        if name not in KNOWN:
            raise ApiError(400, f"{name} is not supported", name)
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise ApiError(400, f"{name} is not supported, got {json.dumps(value)}", name)
    asked = fields.get("model")
    if asked is not None and asked != model:
        raise ApiError(404, f"the model is {model!r}, got {asked!r}", "model")
    read = Fields(fields)
    prompts = prompts_of(fields.get("prompt"), tokenizer, limits)
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", "stream_options")
    seed = read.integer("seed", None, -(2**63), 2**64)
    n = read.integer("n", 1, 1, limits.choices)
    max_tokens = read.integer("max_tokens", DEFAULT_MAX_TOKENS, 1, limits.max_tokens)
    assert n is not None
    assert max_tokens is not None
    if len(prompts) * n > limits.choices:
        raise ApiError(
            400, f"{len(prompts)} prompts times n={n} are more than {limits.choices} choices", "n"
        )
    return Completion(
        prompts, max_tokens, sampling_of(read),
        secrets.randbits(62) if seed is None else seed % 2**64,
        stops_of(fields.get("stop")), n, read.integer("logprobs", None, 0, MAX_LOGPROBS),
        read.boolean("echo"), read.boolean("stream"), bool(options.get("include_usage")),
    )  # fmt: skip


def object_of(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; ApiError 400 for anything else."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body must be a JSON object, got {kind_of(fields)}")
    return fields


class Fields:
    """Numbers and booleans of a request, null meaning the default; ApiError for other types."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            got = value if type(value) in (int, float) else kind_of(value)
            raise ApiError(400, f"{name} must be an integer from {low} to {high}, got {got}", name)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ApiError(400, f"{name} must be a number, got {kind_of(value)}", name)
        return number(name, value)

    def boolean(self, name: str) -> bool:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false, got {kind_of(value)}", name)
        return bool(value)


def kind_of(value: Any) -> str:
    """JSON's name of a value's type."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def sampling_of(read: Fields) -> Sampling:
    try:
        sampling = Sampling(
            read.number("temperature", 1.0), read.integer("top_k", None, 1, 2**31),
            read.number("top_p", 1.0),
        )  # fmt: skip
        check_sampling(sampling)
    except ValueError as error:
        raise ApiError(400, str(error), str(error).split()[0]) from None
    return sampling


def prompts_of(prompt: Any, tokenizer: Tokenizer, limits: Limits) -> list[list[int]]:
    """Tokens of a string, of token ids, or of a list of either."""
    if isinstance(prompt, str) or (is_list_of(prompt, int) and prompt):
        prompt = [prompt]
    if not prompt or not isinstance(prompt, list):
        raise ApiError(400, "prompt must be a string, token ids, or a list of either", "prompt")
    if len(prompt) > limits.choices:
        message = f"{len(prompt)} prompts are more than {limits.choices} choices"
        raise ApiError(400, message, "prompt")
    return [tokens_of(each, tokenizer, limits) for each in prompt]


def tokens_of(prompt: Any, tokenizer: Tokenizer, limits: Limits) -> list[int]:
    if isinstance(prompt, str):
        try:
            tokens: list[int] = tokenizer.encode(prompt).tolist()
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from None
    elif is_list_of(prompt, int):
        tokens = prompt
    else:
        raise ApiError(400, "prompt must be a string, token ids, or a list of either", "prompt")
    if not 1 <= len(tokens) <= limits.context:
        message = f"a prompt must be of 1 to {limits.context} tokens, got {len(tokens)}"
        raise ApiError(400, message, "prompt")
    for token in tokens:
        if not 0 <= token < limits.vocab:
            message = f"token id {token} is outside the vocabulary, 0 to {limits.vocab - 1}"
            raise ApiError(400, message, "prompt")
    return tokens


def is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def stops_of(stop: Any) -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not is_list_of(stops, str) or len(stops) > MAX_STOPS or "" in stops:
        message = f"stop must be a string or up to {MAX_STOPS} strings, none of them empty"
        raise ApiError(400, message, "stop")
    return stops


@dataclass
class Choice:
    """One answer on its way: its text, up to the first stop string."""

    tokenizer: Tokenizer
    stops: list[str]
    end: int | None  # the token that ends a text, and is not part of it
    with_logprobs: bool
    text: str  # all there is, after the prompt if that is echoed
    tokens: int = 0
    finish: str | None = None
    given: int = 0  # characters of it that `take` has given out
    logprobs: dict[str, list[Any]] = field(default_factory=lambda: new_logprobs())

    def __post_init__(self) -> None:
        self._text_of = self.tokenizer.stream()
        self._start = len(self.text)  # no stop string begins in the prompt

    @property
    def done(self) -> bool:
        return self.finish is not None

    def add(self, progress: Progress) -> bool:
        """Takes a chunk's tokens; True where a stop string among them ends the text."""
        for i, token in enumerate(progress.tokens):
            self.tokens += 1
            piece = "" if token == self.end else piece_of(self._text_of, token)
            if self.with_logprobs:
                self._add_logprobs(token, progress.logprobs[i])
            before, self.text = len(self.text), self.text + piece
            if self._cut(before):
                return True
        if progress.finish:
            before, self.text = len(self.text), self.text + self._text_of(None)
            self._cut(before)
            self.finish = self.finish or progress.finish
        return False

    def take(self) -> str:
        """What is new and can't be the beginning of a stop string."""
        end = len(self.text)
        if self.finish is None:
            end -= max((held(self.text, stop) for stop in self.stops), default=0)
        new, self.given = self.text[self.given : end], max(end, self.given)
        return new

    def take_logprobs(self) -> dict[str, list[Any]] | None:
        if not self.with_logprobs:
            return None
        new, self.logprobs = self.logprobs, new_logprobs()
        return new

    def _cut(self, before: int) -> bool:
        """Ends the text at the first stop string that the characters from `before` on complete."""
        places = (
            self.text.find(stop, max(self._start, before - len(stop) + 1)) for stop in self.stops
        )
        found = min((place for place in places if place >= 0), default=-1)
        if found >= 0:
            self.text, self.finish = self.text[:found], "stop"
        return found >= 0

    def _add_logprobs(self, token: int, of: TokenLogprobs) -> None:
        self.logprobs["tokens"].append(name_of(self.tokenizer, token))
        self.logprobs["token_logprobs"].append(of.drawn)
        likeliest: dict[str, float] = {}
        for other, value in of.likeliest:  # of several with one name the first
            likeliest.setdefault(name_of(self.tokenizer, other), value)
        self.logprobs["top_logprobs"].append(likeliest)
        self.logprobs["text_offset"].append(len(self.text))


def new_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def text_of_all(tokenizer: Tokenizer, tokens: list[int]) -> str:
    text_of = tokenizer.stream()
    return "".join(piece_of(text_of, token) for token in (*tokens, None))


def name_of(tokenizer: Tokenizer, token: int) -> str:
    return text_of_all(tokenizer, [token])


def held(text: str, stop: str) -> int:
    """How many of the last characters of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """The JSON of a completion: its identity, its choices and what they took."""

    def __init__(self, request: Completion, tokenizer: Tokenizer, model: str) -> None:
        self.request, self.model, self.tokenizer = request, model, tokenizer
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        echoed = [text_of_all(tokenizer, p) if request.echo else "" for p in request.prompts]
        with_logprobs = request.logprobs is not None
        self.choices = [
            Choice(tokenizer, request.stop, tokenizer.end, with_logprobs, text)
            for text in echoed
            for _ in range(request.n)
        ]

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.request.prompts))
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        return self._object([self._choice(i) for i in range(len(self.choices))]) | {
            "usage": self.usage()
        }

    def events(self, indices: list[int]) -> bytes:
        """Server-sent events of what is new in these choices, and the end once all have ended."""
        extra = {"usage": None} if self.request.include_usage else {}
        told = [
            self._object([choice]) | extra
            for choice in map(self._choice, indices)
            if choice["text"] or choice["finish_reason"] or choice["logprobs"]
        ]
        if self.done and self.request.include_usage:
            told.append(self._object([]) | {"usage": self.usage()})
        end = b"data: [DONE]\n\n" if self.done else b""
        return b"".join(map(event, told)) + end

    def _choice(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        return {
            "text": choice.take(), "index": index, "logprobs": choice.take_logprobs(),
            "finish_reason": choice.finish,
        }  # fmt: skip

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.model, "choices": choices,
        }  # fmt: skip


def event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
