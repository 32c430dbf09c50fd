"""A server that has nothing but metrics."""

import contextlib
import http.server
import threading


class MetricsServer(http.server.ThreadingHTTPServer):
    """Answers /metrics with `text`, and with `status`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.text, self.status = "", 200
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def end(self):
        """Answer no more. Safe to call twice."""
        if self._thread is None:
            return
        self.shutdown()
        self.server_close()
        self._thread.join()
        self._thread = None


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = self.server.text.encode()
        self.send_response(self.server.status if self.path == "/metrics" else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving_metrics(text):
    """A server with that text under /metrics."""
    server = MetricsServer()
    server.text = text
    try:
        yield server
    finally:
        server.end()
