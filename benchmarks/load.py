"""Clients of bench_serve, in a process of their own: raw sockets, so that they cost little.

    python benchmarks/load.py PORT CLIENTS SECONDS TOKENS

Each client asks for one streamed completion after the other on its own connection, as long as the
time lasts. Prints a JSON object: "tokens" and "seconds" of all, and of each request "latencies" and
"first_tokens", in seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field

PROMPT = list(range(8))
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"  # the last event, and the end of the chunked body


@dataclass
class Load:
    tokens: int = 0
    seconds: float = 0
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)


def request(seed: int, tokens: int) -> bytes:
    fields = {"prompt": PROMPT, "max_tokens": tokens, "seed": seed, "stream": True}
    body = json.dumps(fields)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def client(number: int, port: int, until: float, tokens: int, load: Load) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seed = 1000 * number
    while time.perf_counter() < until:
        seed += 1
        start = time.perf_counter()
        writer.write(request(seed, tokens))
        answer, first = b"", 0.0
        while not answer.endswith(END):
            part = await reader.read(1 << 16)
            if not part:
                raise ConnectionError(f"the server closed the connection: {answer!r}")
            answer += part
            if not first and b"data: " in answer:
                first = time.perf_counter() - start
        if not answer.startswith(b"HTTP/1.1 200") or b'"finish_reason": "length"' not in answer:
            raise RuntimeError(answer.decode())
        load.tokens += tokens
        load.latencies.append(time.perf_counter() - start)
        load.first_tokens.append(first)
    writer.close()


async def main(port: int, clients: int, seconds: float, tokens: int) -> None:
    load, start = Load(), time.perf_counter()
    await asyncio.gather(*(client(i, port, start + seconds, tokens, load) for i in range(clients)))
    load.seconds = time.perf_counter() - start
    print(json.dumps(asdict(load)))


if __name__ == "__main__":
    port, clients, seconds, tokens = sys.argv[1:]
    asyncio.run(main(int(port), int(clients), float(seconds), int(tokens)))
