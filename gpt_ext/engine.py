"""Generation on CPUs: a model's weights packed for the native engine, and threads for its calls.

Packs are kept a model and format, and shared: they never change. Whether a pack still holds the
model's weights is asked of the weights themselves, by a hash of all their bytes, whenever text is
asked for. So no way of changing a weight goes unnoticed, `.data` among them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpt_ext.ops import decode

if TYPE_CHECKING:
    from gpt_ext.model import GPT, GPTConfig

CALL_SECONDS = 0.02  # of one native call, after which Python sees signals and other threads

Result = TypeVar("Result")


@dataclass(frozen=True)
class Engine:
    """A model's weights as they were at one moment, packed."""

    config: GPTConfig
    form: decode.WeightFormat
    packed: Tensor


class NotPlainError(Exception):
    """The model is not as `GPT` builds it; the message says where."""


_engines: WeakKeyDictionary[GPT, dict[str, tuple[object, Engine]]] = WeakKeyDictionary()
_lock = threading.Lock()
_begun = False  # whether native calls have made OpenMP's threads


def engine_for(model: GPT, form: decode.WeightFormat) -> Engine:
    """The engine with the model's weights of this moment; NotPlainError if there can be none."""
    global _begun
    _begun = True
    weights, eps = weights_of(model)
    key = (eps, [(w.dtype, w.shape) for w in weights], decode.fingerprint(weights))
    with _lock:
        engines = _engines.setdefault(model, {})
        if form in engines and engines[form][0] == key:
            return engines[form][1]
    config = model.config
    packed = interruptibly(
        partial(decode.pack, weights, config.num_heads, config.activation, form, eps)
    )
    engine = Engine(config, form, packed)
    with _lock:
        engines[form] = (key, engine)
    return engine


class Helper:
    """A thread that works for another one, as long as that one lives.

    It keeps its OpenMP threads, and they their memory: anew for each token of 16 rows, they made
    GPT-2 take twice the time.
    """

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, args=(self.tasks,), daemon=True).start()

    def __del__(self) -> None:
        self.tasks.put(None)

    @staticmethod
    def _run(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
        while task := tasks.get():
            task()


_helpers = threading.local()


def _begin_again() -> None:
    """In a child that fork() made: it has none of its parent's threads, and nobody holds locks."""
    global _helpers, _lock
    _helpers, _lock = threading.local(), threading.Lock()
    if _begun:
        torch.set_num_threads(1)  # OpenMP's other threads are the parent's: to wait for for ever


os.register_at_fork(after_in_child=_begin_again)


def interruptibly(work: Callable[[], Result]) -> Result:
    """work(), in a thread beside: the one that waits for it sees Ctrl-C, as native code can't.

    A large model is packed for a second, and takes a tenth of one for a token of each row.
    """
    result: Future[Result] = Future()
    threads = torch.get_num_threads()

    def run() -> None:
        try:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    if not hasattr(_helpers, "mine"):
        _helpers.mine = Helper()
    _helpers.mine.tasks.put(run)
    while not result.done():  # again and again: a signal just before a wait does not end it
        wait([result], CALL_SECONDS)
    return result.result()


def weights_of(model: GPT, device: str | None = "cpu") -> tuple[list[Tensor], float]:
    """The model's weights in the order of `decode.pack`, and the eps of its norms.

    Raises NotPlainError where a module that is called is not of the very type that GPT makes, or
    has hooks or methods of its own: what such a module computes, the engine does not know. Also
    where a weight is not on this device (None: on any), and where sizes or the activation are not
    those of the config.
    """
    from gpt_ext.model import GPT, Attention, Block, FeedForward

    config = model.config
    vocab, dim, hidden = config.vocab_size, config.model_dim, 4 * config.model_dim
    heads = (3, config.num_heads, dim // config.num_heads)
    eps: set[Any] = set()

    def plain(name: str, module: Any, kind: type[nn.Module], *methods: str) -> None:
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        replaced = vars(module).keys() & {"forward", *methods}
        if type(module) is not kind or any(hooks) or replaced:
            raise NotPlainError(f"{name} is no plain {kind.__name__}")

    def tensor(name: str, value: Any, *shape: int) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != shape:
            raise NotPlainError(f"{name} is no tensor {shape}")
        if device and value.device.type != device:
            raise NotPlainError(f"{name} is on {value.device}, not on {device}")
        return value

    def layer(name: str, module: Any, *shape: int, needs_bias: bool = False) -> list[Tensor]:
        weight = tensor(f"{name}.weight", getattr(module, "weight", None), *shape)
        bias = getattr(module, "bias", None)
        if bias is None and not needs_bias:
            bias = weight.new_zeros(shape[0])
        return [weight, tensor(f"{name}.bias", bias, shape[0])]

    def norm(name: str, module: Any) -> list[Tensor]:
        eps.add(getattr(module, "eps", None))
        return [tensor(f"{name}.{k}", getattr(module, k, None), dim) for k in ("weight", "bias")]

    plain("the model", model, GPT, "embed", "logits")
    tokens, positions = model.token_embedding, model.position_embedding
    weights = [
        tensor("token_embedding.weight", tokens.weight, vocab, dim),
        tensor("position_embedding.weight", positions.weight, config.context_length, dim),
        *norm("final_norm", model.final_norm),
        *layer("vocab_projection", model.vocab_projection, vocab, dim),
    ]
    if len(model.blocks) != config.num_blocks:
        raise NotPlainError(f"it has {len(model.blocks)} blocks, its config {config.num_blocks}")
    block: Any
    for i, block in enumerate(model.blocks):
        name = f"blocks[{i}]"
        plain(name, block, Block)
        attention, network = block.attention, block.feed_forward
        plain(f"{name}.attention", attention, Attention)
        plain(f"{name}.feed_forward", network, FeedForward)
        if (attention.packed_shape, network.activation) != (heads, config.activation):
            raise NotPlainError(f"{name} has other heads, or another activation, than its config")
        weights += [
            *norm(f"{name}.attention_norm", block.attention_norm),
            *layer(f"{name}.attention.qkv", attention.qkv, 3 * dim, dim),
            *layer(f"{name}.attention.projection", attention.projection, dim, dim),
            *norm(f"{name}.feed_forward_norm", block.feed_forward_norm),
            *layer(f"{name}.feed_forward.up", network.up, hidden, dim, needs_bias=True),
            *layer(f"{name}.feed_forward.down", network.down, dim, hidden, needs_bias=True),
        ]
    (value,) = eps if len(eps) == 1 else (None,)
    if not isinstance(value, float):
        raise NotPlainError("its norms have not all the same eps")
    return weights, value
