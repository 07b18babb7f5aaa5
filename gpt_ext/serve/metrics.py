"""What /metrics tells, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Durations, counted by the bounds of SECONDS."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        counts = list(accumulate(self.counts))
        bounds = [*map(str, SECONDS), "+Inf"]
        pairs = zip(bounds, counts, strict=True)
        lines = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in pairs]
        return [*lines, f"{name}_sum {self.sum}", f"{name}_count {counts[-1]}"]


class Metrics:
    """Counted in the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()  # by HTTP status
        self.prompt_tokens = self.completion_tokens = self.disconnects = 0
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, running: int, waiting: int, slots: int) -> str:
        """The page, with what the scheduler has on its hands now."""
        requests = [
            f'gpt_ext_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(self.requests.items())
        ]
        lines = family("requests_total", "counter", "Completions by HTTP status.", requests)
        for name, kind, text, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("completion_tokens_total", "counter", "Tokens drawn.", self.completion_tokens),
            ("disconnects_total", "counter", "Clients gone or stalled.", self.disconnects),
            ("sequences_running", "gauge", "Sequences that are being written.", running),
            ("sequences_waiting", "gauge", "Sequences in the queue.", waiting),
            ("slots", "gauge", "Sequences that can be written at once.", slots),
        ):
            lines += family(name, kind, text, [f"gpt_ext_{name} {value}"])
        for name, text, histogram in (
            ("first_token_seconds", "From a request to its first token.", self.first_token),
            ("duration_seconds", "From a request to its last token.", self.duration),
        ):
            lines += family(name, "histogram", text, histogram.lines(f"gpt_ext_{name}"))
        return "\n".join(lines) + "\n"


def family(name: str, kind: str, text: str, samples: list[str]) -> list[str]:
    return [f"# HELP gpt_ext_{name} {text}", f"# TYPE gpt_ext_{name} {kind}", *samples]
