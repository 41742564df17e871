"""64 clients at once against `lmm serve`, beside one at a time: ``python benchmarks/serve_load.py``.

The demo model answers questions about pictures of the demo world (short answers, and some forced to 256 tokens) and about
clips. One client asks everything once, one question after the other; then 64 ask the same at random for two minutes, one of
them a question about a video of ten minutes first, and every answer must be the one that was given alone. The video does not
count for the one who asks alone. Before, both are done once, so that all is compiled. Clients share the processors with the
server, so they do as little as they can: requests are bytes before the clock starts. Prints a table, writes
benchmarks/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from machine import machine

from lmm_jax.demo.clips import encode, frames, make_clip
from lmm_jax.demo.dataset import write_test_set

RESULT = Path(__file__).with_suffix(".json")
PICTURES, CLIPS, FORCED = 120, 12, 12  # questions of each kind in a turn
SEED = 64
JSON = {"Content-Type": "application/json"}


def main() -> int:
    """Draws, serves, asks, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        questions, long = draw(Path(folder))
        with served() as url:
            found = asyncio.run(measure(url, questions, long, args.clients, args.seconds))
    RESULT.write_text(json.dumps({"machine": machine("jax", "flax", "uvicorn"), **found}, indent=2) + "\n")
    print(table(found))
    return int(found["wrong"] > 0)


def draw(folder: Path) -> tuple[list[bytes], bytes]:
    """Requests of one turn, and a video of ten minutes."""
    write_test_set(folder, images=PICTURES // 4, clips=CLIPS, seed=SEED)
    records = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    chosen = random.Random(SEED)
    stills = chosen.sample([r for r in records if "image" in r], PICTURES + FORCED)
    clips = chosen.sample([r for r in records if "video" in r], CLIPS)
    questions = [request(folder, r) for r in stills[:PICTURES] + clips]
    questions += [request(folder, r, max_tokens=256, ignore_eos=True) for r in stills[PICTURES:]]
    rng = np.random.default_rng(SEED)
    return questions, encode([frame for _ in range(75) for frame in frames(make_clip(rng))])


def request(folder: Path, record: dict[str, Any], **how: Any) -> bytes:
    """A question of the demo world's test set for the API."""
    kind, media = ("image_url", "image/png") if "image" in record else ("video_url", "video/mp4")
    content = base64.b64encode((folder / record[kind.removesuffix("_url")]).read_bytes()).decode()
    parts = [{"type": "text", "text": record["question"]}, {"type": kind, kind: {"url": f"data:{media};base64,{content}"}}]
    return body(parts, **how)


def body(parts: list[dict[str, Any]], **how: Any) -> bytes:
    """A request of one turn."""
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 16} | how).encode()


@contextmanager
def served() -> Iterator[str]:
    """A server of its own process."""
    command = [sys.executable, "-m", "lmm_jax", "serve", "--port", "0", "--no-page"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        said = ""
        while "startup complete" not in said:
            line = server.stderr.readline()
            said += line
            if not line:
                raise SystemExit(said)
        os.set_blocking(server.stderr.fileno(), False)
        try:
            yield re.search(r"http://\S+", said)[0]
        finally:
            server.send_signal(signal.SIGTERM)


async def measure(url: str, questions: list[bytes], video: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """Everything once to compile; one at a time; many at once; one at a time again."""
    everyone = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=everyone, timeout=aiohttp.ClientTimeout(600)) as client:
        form = aiohttp.FormData()
        form.add_field("file", video, filename="long.mp4")
        async with client.post("/v1/files", data=form, raise_for_status=True) as response:
            part = {"type": "video_url", "video_url": {"file_id": (await response.json())["id"]}}
        long = body([{"type": "text", "text": "What moves?"}, part])
        endless = json.dumps(json.loads(questions[-1]) | {"max_tokens": 1024, "stream": True}).encode()
        right = [await ask(client, q) for q in questions]
        right_long = await ask(client, long)
        await crowd(client, questions, right, long, right_long, clients, seconds)
        for _ in range(2):  # in the slots of the crowd, then in its own
            await leave(client, endless)
        alone = [await one_by_one(client, questions, right)]
        found = await crowd(client, questions, right, long, right_long, clients, seconds)
        alone.append(await one_by_one(client, questions, right))
        found["freed_seconds"] = [await leave(client, endless) for _ in range(10)]
        async with client.get("/health") as response:
            health = (await response.json())["status"]
    single = statistics.mean(len(questions) / sum(times) for times in alone)
    lone = [t for times in alone for t in times]
    found["one_by_one"] = {"per_second": round(single, 2), **percentiles(lone)}
    found["ratio"] = round(found["per_second"] / single, 2)
    return found | {"clients": clients, "seconds": seconds, "health": health}


async def ask(client: aiohttp.ClientSession, question: bytes) -> str:
    """The answer. What the server refuses ends the measurement."""
    async with client.post("/v1/chat/completions", data=question, headers=JSON, raise_for_status=True) as response:
        return (await response.json())["choices"][0]["message"]["content"]


async def one_by_one(client: aiohttp.ClientSession, questions: list[bytes], right: list[str]) -> list[float]:
    """Seconds of each question."""
    times = []
    for question, answer in zip(questions, right):
        start = time.perf_counter()
        if await ask(client, question) != answer:
            raise SystemExit("asked twice alone, a question had two answers")
        times.append(time.perf_counter() - start)
    return times


async def crowd(
    client: aiohttp.ClientSession,
    questions: list[bytes],
    right: list[str],
    long: bytes,
    right_long: str,
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    """Many at once, each asking what is in a shuffled turn, and one of them about the long video before."""
    begin, times, wrong = time.perf_counter(), [], []
    end = begin + seconds

    async def turns(seed: int) -> None:
        order = random.Random(seed)
        while True:
            for n in order.sample(range(len(questions)), len(questions)):
                start = time.perf_counter()
                if start > end:
                    return
                if await ask(client, questions[n]) != right[n]:
                    wrong.append(n)
                times.append((time.perf_counter(), time.perf_counter() - start, n))

    async def watch() -> float:
        if await ask(client, long) != right_long:
            wrong.append(-1)
        took = time.perf_counter() - begin
        await turns(clients)
        return took

    video, *_ = await asyncio.gather(watch(), *(turns(seed) for seed in range(1, clients)))
    within = [(seconds, n) for at, seconds, n in times if at <= end]
    short, forced = ([s for s, n in within if (n >= PICTURES + CLIPS) == of] for of in (False, True))
    return {
        "answers": len(times) + 1,
        "wrong": len(wrong),
        "per_second": round(len(within) / seconds, 2),
        "short": percentiles(short),
        "forced": percentiles(forced),
        "long_video_seconds": round(video, 3),
    }


async def leave(client: aiohttp.ClientSession, question: bytes) -> float:
    """Seconds from when a client leaves in the middle of a stream until its slot is free."""
    async with client.post("/v1/chat/completions", data=question, headers=JSON, raise_for_status=True) as stream:
        while b'"content":"' not in (await stream.content.readline()).replace(b'"content":""', b""):
            pass
        stream.close()  # at its end aiohttp would read what is left
    start = time.perf_counter()
    while True:
        async with client.get("/metrics") as response:
            if "lmm_running 0.0" in await response.text():
                return round(time.perf_counter() - start, 3)


def percentiles(times: list[float]) -> dict[str, float]:
    """Seconds."""
    return {f"p{p}": round(float(np.percentile(times, p)), 3) for p in (50, 99)}


def table(found: dict[str, Any]) -> str:
    """As Markdown."""

    def seconds(of: dict[str, float]) -> str:
        return f"{of['p50']:.2f} | {of['p99']:.2f} |"

    one, many = found["one_by_one"], f"{found['clients']} at once"
    lines = ["| asked | answers/s | p50, s | p99, s |", "|---|---|---|---|"]
    lines.append(f"| one at a time | {one['per_second']:.1f} | {seconds(one)}")
    lines.append(f"| {many}, in all | {found['per_second']:.1f} | | |")
    lines.append(f"| {many}, short answers | | {seconds(found['short'])}")
    lines.append(f"| {many}, forced to 256 tokens | | {seconds(found['forced'])}")
    lines.append(f"| {many}, the video of ten minutes | | {found['long_video_seconds']:.2f} | |")
    lines += [
        "",
        f"A client that left in the middle of a stream: its slot was free after {max(found['freed_seconds'])} s at most.",
    ]
    lines += ["", f"{found['answers']} answers, {found['wrong']} wrong; {found['ratio']} times one at a time."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
