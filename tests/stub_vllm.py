"""A server that speaks vLLM's protocol, but draws tokens from the seed alone."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


class StubVllm(ThreadingHTTPServer):
    """Returns samples of 1 to 3 tokens and eos, whatever the weights, and records the requests."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.weights: list[dict[str, Tensor]] = []
        """The weights received, in order."""
        self.folders: list[Path] = []
        self.adapters: set[str] = set()
        self.status = 200
        """HTTP status of every answer."""
        self.dies_at: tuple[str, int] | None = None
        """A path, and the number of requests for it after which the server is dead."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def requests(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]

    def take(self, folder: Path) -> None:
        self.folders.append(folder)
        (file,) = folder.glob("*.safetensors")
        self.weights.append(load_file(file))

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The status of a response, and its JSON or text, in the form of vLLM 0.32."""
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.take(Path(body["kwargs"]["weights_path"]))
        elif path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return 400, {"error": "already loaded"}
            self.take(Path(body["lora_path"]))
            self.adapters.add(body["lora_name"])
            return 200, "Success: LoRA adapter added successfully."
        elif path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in self.adapters:
                return 404, {"error": "not found"}
            self.adapters.remove(body["lora_name"])
        elif path == "/v1/completions":
            if "model" in body and body["model"] not in self.adapters:
                return 404, {"error": "no such model"}
            return 200, {"choices": choices(body)}
        return 200, {}


def choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    """All samples of all prompts, each with its own seed."""
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    num = body.get("n", 1)
    assert num == 1 or body["temperature"] > 0, "vLLM refuses several greedy samples"
    found = []
    for index in range(len(prompts) * num):
        seed = body["seed"] + index % num if body["temperature"] > 0 else 0
        draw = random.Random(f"{prompts[index // num]} {seed}")
        length = draw.randint(1, body["max_tokens"] - 1)
        tokens = [draw.randint(3, 12) for _ in range(length)] + [1]
        logprobs = {"token_logprobs": [-draw.random() for _ in tokens]}
        found.append(
            {"index": index, "token_ids": tokens, "logprobs": logprobs, "finish_reason": "stop"}
        )
    return found[::-1]  # vLLM promises no order


class _Handler(BaseHTTPRequestHandler):
    server: StubVllm

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.server
        stub.asked.append((self.path, body))
        if stub.dies_at is not None and len(stub.requests(stub.dies_at[0])) > stub.dies_at[1]:
            self.connection.close()
            return
        status, answer = stub.answer(self.path, body) if stub.status == 200 else (stub.status, {})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def stub_vllm(number: int = 1) -> Iterator[list[StubVllm]]:
    """Servers that run inside the block, `number` of them."""
    stubs = [StubVllm() for _ in range(number)]
    threads = [threading.Thread(target=stub.serve_forever) for stub in stubs]
    for thread in threads:
        thread.start()
    try:
        yield stubs
    finally:
        for stub, thread in zip(stubs, threads, strict=True):
            stub.shutdown()
            thread.join()
            stub.server_close()
