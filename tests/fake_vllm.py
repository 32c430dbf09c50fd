"""A server that imitates what applications use of vLLM's: tokenization, models, completions, and failures."""

import contextlib
import http.server
import itertools
import json
import re
import threading

BOS = 1
_PIECES = re.compile(r"<\|\w+\|>| ?\w+| ?[^\s\w]+?(?=<\||\w|\s|$)|\s+(?=<\|)|\s+(?!\S)|\s")


class ToyTokenizer:
    """Cuts as GPT-2's does: a blank line is one token at the end of a text, and two amid it."""

    def __init__(self, bos=True):
        self.bos, self._ids, self._lock = bos, {}, threading.Lock()

    def encode(self, text, *, add_special_tokens=False):
        pieces = _PIECES.findall(text)
        assert "".join(pieces) == text
        with self._lock:
            ids = [self._ids.setdefault(piece, len(self._ids) + 2) for piece in pieces]
        return [BOS, *ids] if add_special_tokens and self.bos else ids

    def decode(self, ids):
        pieces = {BOS: "", **{number: piece for piece, number in self._ids.items()}}
        return "".join(pieces[each] for each in ids)

    def lay_out(self, messages):
        turns = "".join(f"<|start|>{each['role']}\n{each['content']}<|end|>\n" for each in messages)
        return self.encode(turns + "<|start|>assistant\n")


class FakeServer:
    """`answers`: path -> a function of the body that gives (status, body), or None for the usual; `asked`: the
    requests seen, as (path, body, headers). `reports`: whether it says what it stores;
    `late`: what it stores, it knows by the next answer; `keeps`: whether it stores anything.
    """

    def __init__(self):
        self.tokenizer, self.max_model_len, self.reports = ToyTokenizer(), 2000, True
        self.late, self.keeps = False, True
        self.answers, self.asked, self.prefixes = {}, [], set()

    def prompts(self):
        """Bodies of the completions asked for."""
        return [body for path, body, _ in self.asked if path == "/v1/completions"]

    def answer(self, path, body):
        special = self.answers.get(path)
        found = special(body) if special else None
        if found is not None:
            return found
        if path == "/v1/models":
            cards = [{"id": "toy", "max_model_len": self.max_model_len}, {"id": "toy-lora", "max_model_len": None}]
            return 200, {"object": "list", "data": cards}
        if path == "/tokenize" and "messages" in body:
            return 200, {"tokens": self.tokenizer.lay_out(body["messages"])}
        if path == "/tokenize":
            return 200, {
                "tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            }
        if path == "/v1/completions":
            return self._complete(body)
        return 404, {"detail": "Not Found"}

    def _complete(self, body):
        prompt, hints = tuple(body["prompt"]), body["kv_transfer_params"]["ragkv"]
        if "order" in hints:
            return 200, {"kv_transfer_params": {"ragkv": {"order": self._order(**hints["order"])}}}
        if len(prompt) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": f"{len(prompt)} tokens\nare too many", "code": 400}}
        hit = next((end for end in range(len(prompt), 0, -1) if prompt[:end] in self.prefixes), 0)
        if self.keeps:
            self.prefixes.update(prompt[:end] for end in range(1, len(prompt) + 1))
        answer = {"choices": [{"text": "."}], "kv_transfer_params": None}
        if self.reports:
            spans = hints["documents"]
            report = {
                "hit_tokens": hit,
                "stored_tokens": hit if self.late or not self.keeps else len(prompt),
                "documents": spans,
            }
            answer["kv_transfer_params"] = {"ragkv": report}
        return 200, answer

    def _order(self, before, passages):
        """Of all orders the first of which most is stored, in whole passages."""
        numbers, best, most, given = range(len(passages)), None, -1, 0
        for order in itertools.permutations(numbers):
            prompt, held = list(before), 0
            for number in order:
                prompt += passages[number]
                held = len(prompt) - len(before) if tuple(prompt) in self.prefixes else held
            given = held if order == tuple(numbers) else given
            best, most = (order, held) if held > most else (best, most)
        return {
            "passages": list(best),
            "tokens": sum(map(len, passages)),
            "given_tokens": given,
            "ordered_tokens": most,
        }


@contextlib.contextmanager
def serving():
    """A FakeServer that listens; its `url` says where."""
    fake, lock = FakeServer(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(data) if data else None
            with lock:
                fake.asked.append((self.path, body, dict(self.headers)))
                status, answer = fake.answer(self.path, body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
