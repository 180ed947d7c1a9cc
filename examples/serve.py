"""Serve an edited model over HTTP, by standard library alone: python examples/serve.py [MODEL] [--stay]

    curl -N localhost:8000 -d '{"prompt": "The capital of France is", "adapter": "lyon", "stream": true}'

Each request names its adapter, or none for the unedited model; many are answered at once by one copy of the model.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import urlopen

import torch
from peft import get_peft_model
from transformers import TextIteratorStreamer

import peft_baft


def make_server(model: Any, tokenizer: Any, port: int = 0, workers: int = 4) -> ThreadingHTTPServer:
    """Return a server on a port (0: a free one) that generates for at most `workers` requests at a time."""
    turn = threading.BoundedSemaphore(workers)

    def generate(request: dict[str, Any], streamer: Any) -> None:
        inputs = tokenizer(request["prompt"], return_tensors="pt").to(model.device)
        name = request.get("adapter") or "__base__"  # which stands for none in PEFT
        length = int(request.get("max_new_tokens", 16))
        with turn, torch.no_grad():
            model.generate(
                **inputs,
                adapter_names=[name],
                max_new_tokens=length,
                do_sample=False,
                streamer=streamer,
                pad_token_id=tokenizer.eos_token_id,
            )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if request.get("adapter") not in (None, *model.peft_config):
                self.send_error(404, f"known adapters: {', '.join(model.peft_config)}")
                return
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            thread = threading.Thread(target=generate, args=(request, streamer))
            thread.start()
            self.send_response(200)
            self.end_headers()
            parts = streamer if request.get("stream") else ["".join(streamer)]
            for part in parts:
                self.wfile.write(part.encode())
            thread.join()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # connections that wait to be taken, instead of 5

    return Server(("127.0.0.1", port), Handler)


def main(model_name: str = "smollm2", stay: str = "") -> None:
    """Teach a fact to an adapter, serve it, and ask with it and without."""
    base, tokenizer = peft_baft.load_model(model_name)
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"), adapter_name="lyon")
    editor = peft_baft.BaftEditor(model, tokenizer, template="raw", scope=peft_baft.NARROW)
    editor.edit([peft_baft.Edit("The capital of France is", "Lyon")])
    server = make_server(model.eval(), tokenizer, port=8000 if stay else 0)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=not stay).start()
    for adapter in (None, "lyon"):
        request = {"prompt": "The capital of France is", "adapter": adapter, "max_new_tokens": 3}
        with urlopen(address, json.dumps(request).encode()) as answer:
            print(f"{adapter or 'unedited'}: {answer.read().decode()!r}")
    if not stay:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main(*sys.argv[1:])
