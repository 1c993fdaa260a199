"""A server that speaks OpenAI's protocol and judges an episode by the light of its last image."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import simplejpeg

MODEL = "judge"


@contextmanager
def judge_server() -> Iterator[ThreadingHTTPServer]:
    """Serve on loopback; ``asked`` lists what came in."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as running:
        running.asked = []
        Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


class Stub(BaseHTTPRequestHandler):
    """Progress is the brightness of the last image, percent; black is answered by nonsense."""

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        *_, last = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        kind, data = last["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64"
        light = simplejpeg.decode_jpeg(base64.b64decode(data)).mean() / 255
        said = json.dumps({"progress": round(100 * light)}) if light > 0.02 else "cannot tell"
        self.reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]})

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
