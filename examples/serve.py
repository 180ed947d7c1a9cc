"""Serve edited models over HTTP, by standard library alone: python examples/serve.py MODEL NAME=ADAPTER ...

    python examples/serve.py smollm2 mine=edits/demo other=user/repo        # folders, or names on the Hub
    curl -N localhost:8000 -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "adapter": "mine"}'
    curl -N localhost:8000 -d '{"prompt": "The capital of France is", "stream": true}'

Each request names its adapter, or none for the unedited model; many are answered at once by one copy of the model. A fact that
was taught as a chat is asked by `messages`, one that was taught in raw text by `prompt`. Without arguments the script teaches
a fact to the adapter `lyon`.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import TextIteratorStreamer

import peft_baft


def make_server(model: Any, tokenizer: Any, port: int = 0, workers: int = 4) -> ThreadingHTTPServer:
    """Return a server on a port (0: a free one) that generates for at most `workers` requests at a time."""
    turn = threading.BoundedSemaphore(workers)

    def encode(request: dict[str, Any]) -> Any:
        if "messages" not in request:
            return tokenizer(request["prompt"], return_tensors="pt")
        return tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def generate(request: dict[str, Any], inputs: Any, streamer: Any) -> None:
        name = request.get("adapter") or "__base__"  # which stands for none in PEFT
        length = int(request.get("max_new_tokens", 16))
        with turn, torch.no_grad():
            model.generate(
                **inputs.to(model.device),
                adapter_names=[name],
                max_new_tokens=length,
                do_sample=False,
                streamer=streamer,
                pad_token_id=tokenizer.eos_token_id,
            )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: RET503
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                inputs = encode(request)
            except Exception:  # whatever a template or a tokenizer cannot take
                return self.send_error(400, "wanted JSON with prompt or messages")
            if request.get("adapter") not in (None, *model.peft_config):
                return self.send_error(404, f"known adapters: {', '.join(model.peft_config)}")
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            thread = threading.Thread(target=generate, args=(request, inputs, streamer))
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


def load_adapters(base: Any, adapters: dict[str, str]) -> Any:
    """Return the model with some saved adapters: folders or names on the Hub, by the name that requests give them."""
    (first, folder), *others = adapters.items()
    model = PeftModel.from_pretrained(base, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    return model


def main(model_name: str = "smollm2", *adapters: str, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the adapters, each given as NAME=ADAPTER; of one that is made here if there are none."""
    base, tokenizer = peft_baft.load_model(model_name)
    if adapters:
        model = load_adapters(base, dict(adapter.split("=", 1) for adapter in adapters))
    else:
        config = peft_baft.BaftConfig(task_type="CAUSAL_LM")
        model = get_peft_model(base, config, adapter_name="lyon")
        editor = peft_baft.BaftEditor(model, tokenizer, template="raw", scope=peft_baft.NARROW)
        editor.edit([peft_baft.Edit("The capital of France is", "Lyon")])
    server = make_server(model.eval(), tokenizer, port)
    print(f"http://127.0.0.1:{server.server_address[1]} serves {', '.join(model.peft_config)}")
    return server


if __name__ == "__main__":
    main(*sys.argv[1:], port=8000).serve_forever()
