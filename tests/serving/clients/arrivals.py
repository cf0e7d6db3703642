"""Open-loop load by bare sockets: a port, a rate and seconds go in; what became of every request comes out as JSON.

Requests arrive when they are due, however many are open; every other one streams. A process of its own with next to no
work of its own, so that what it measures is the server. Times are seconds, from before the connection to the last byte.

    python arrivals.py PORT RATE SECONDS            rate: requests a second, evenly spread
    python arrivals.py PORT closed SECONDS WIDTH    so many at a time, each after the one before: what is sustained
"""

import asyncio
import json
import sys
import time
from typing import Any

TOKENS = 32


def request(stream: bool) -> bytes:
    body = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "stream": stream}
    data = json.dumps(body)
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode()


REQUESTS = (request(False), request(True))


async def one(port: int, number: int) -> dict[str, Any]:
    """status, seconds, seconds to the first byte, and whether the answer is complete."""
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(REQUESTS[number % 2])
        head = await reader.readuntil(b"\r\n\r\n")
        first = time.perf_counter() - begun
        body = await reader.read(-1)
    finally:
        writer.close()
    status = int(head.split(b" ", 2)[1])
    whole = b"data: [DONE]" in body if number % 2 else f'"completion_tokens":{TOKENS}'.encode() in body
    return {
        "status": status,
        "seconds": time.perf_counter() - begun,
        "first_byte": first,
        "complete": status == 200 and whole,
        "retry_after": b"retry-after:" in head.lower(),
    }


async def open_loop(port: int, rate: float, seconds: float) -> list[dict[str, Any]]:
    begun, tasks = time.perf_counter(), []
    for number in range(int(rate * seconds)):
        delay = begun + number / rate - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(one(port, number)))
    return await asyncio.gather(*tasks)


async def closed_loop(port: int, seconds: float, width: int) -> list[dict[str, Any]]:
    end = time.perf_counter() + seconds

    async def worker(number: int) -> list[dict[str, Any]]:
        done = []
        while time.perf_counter() < end:
            done.append(await one(port, number))
        return done

    return [result for results in await asyncio.gather(*map(worker, range(width))) for result in results]


if __name__ == "__main__":
    port, mode, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    begun = time.perf_counter()
    if mode == "closed":
        results = asyncio.run(closed_loop(port, seconds, int(sys.argv[4])))
    else:
        results = asyncio.run(open_loop(port, float(mode), seconds))
    json.dump({"results": results, "seconds": time.perf_counter() - begun}, sys.stdout)
