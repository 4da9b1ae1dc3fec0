"""A reward service of one's own, with nothing but the standard library: `python examples/reward_service.py [PORT]`."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(completion, answer):
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return float(answer.lower() in text.lower())


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pairs = zip(asked["completions"], asked["columns"]["answer"], strict=True)
        body = json.dumps({"rewards": [score(completion, answer) for completion, answer in pairs]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Requests are not logged: they hold whole answers."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8009
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
