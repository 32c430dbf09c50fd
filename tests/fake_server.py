"""A process that answers as vLLM's server does, and misbehaves as told. Standard library only: it starts at once.

python fake_server.py '{"port": 8000, "unwell": 2, …}'

`unwell`: health checks that fail first; `dies`: a text to print and end with, instead of serving; `deaf`: ignore
SIGTERM; `child`: start a child process, which does nothing; `hits`: tokens of each prompt that are hit; `version`:
what it says, if anything.
"""

import json
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROMPT_TOKENS = 100
TOLD = {"unwell": 0, "dies": None, "deaf": False, "child": False, "hits": 0, "version": "9"}


def command(port, **told):
    """What to run for such a server."""
    return [sys.executable, __file__, json.dumps(TOLD | told | {"port": port})]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self):
        if self.path == "/health" and self.server.told["unwell"] > 0:
            self.server.told["unwell"] -= 1
            self.send_error(503)
        elif self.path == "/metrics":
            asked, hits = Handler.asked, self.server.told["hits"]
            self.answer(
                "# TYPE vllm:prompt_tokens counter\n"
                f'vllm:prompt_tokens_total{{model_name="m",engine="0"}} {asked * PROMPT_TOKENS}.0\n'
                "# TYPE vllm:prompt_tokens_by_source counter\n"
                f'vllm:prompt_tokens_by_source_total{{source="local_compute"}} {asked}.0\n'
                "# TYPE vllm:prompt_tokens_cached_by_source counter\n"
                f'vllm:prompt_tokens_cached_by_source_total{{engine="0",source="host"}} {asked * hits}.0\n'
                'vllm:prompt_tokens_cached_by_source_total{engine="0",source="disk"} 0.0\n'
            )
        elif self.path == "/version" and not self.server.told["version"]:
            self.send_error(404)
        else:
            said = {"/v1/models": {"data": [{"id": "m"}]}, "/version": {"version": self.server.told["version"]}}
            self.answer(json.dumps(said.get(self.path)))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.answer(json.dumps({"tokens": [ord(letter) for letter in body["prompt"]]}))
        elif self.path == "/detokenize":
            self.answer(json.dumps({"prompt": "".join(map(chr, body["tokens"]))}))
        else:
            Handler.asked += 1
            self.stream(body.get("max_completion_tokens") or body["max_tokens"])

    def stream(self, tokens):
        chunks = [{"choices": [{"index": 0, "delta": {"content": f" {n}"}}]} for n in range(tokens)]
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens}
        events = [*map(json.dumps, [*chunks, {"choices": [], "usage": usage}]), "[DONE]"]
        self.answer("".join(f"data: {event}\n\n" for event in events), "text/event-stream")

    def answer(self, text, kind="text/plain"):
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def main():
    told = json.loads(sys.argv[1])
    print("starting", flush=True)
    if told["dies"] is not None:
        sys.exit(told["dies"])
    if told["deaf"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if told["child"]:
        subprocess.Popen(["sleep", "1000"])
    server = ThreadingHTTPServer(("127.0.0.1", told["port"]), Handler)
    server.told = told
    server.serve_forever()


if __name__ == "__main__":
    main()
