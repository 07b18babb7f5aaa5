"""What an endpoint can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpt_ext.options import option


@dataclass(frozen=True)
class ServeOptions:
    """How an endpoint writes, and its limits."""

    overflow: Literal["exact", "reprefill"] = option(
        "reprefill",
        "beyond the context: compute it anew now and then, or for each token (exact)",
    )
    slots: int = option(32, "texts written at once")
    queue: int = option(128, "texts that may wait")
    max_tokens: int = option(4096, "tokens of one answer at most")
    max_body: int = option(1 << 20, "bytes of a request at most")
    timeout: float = option(120.0, "seconds of one request at most")
