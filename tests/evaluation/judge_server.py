"""An HTTP server in a thread that judges as a script says: well, slowly, brokenly or not at all."""

import contextlib
import http.server
import json
import threading
import time


def completion(text, **usage):
    return {"model": "judge-0001", "choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class Server(http.server.ThreadingHTTPServer):
    """Does to each request what is next in `script`, and then as the last says."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = [], [], threading.Lock()
        self.base = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        pass  # clients that hang up are part of the tests


@contextlib.contextmanager
def serving():
    """A server while it is wanted."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(
                {"path": self.path, "headers": dict(self.headers), "body": body, "at": time.monotonic()}
            )
            self.asked = body
            step = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        step(self)

    def answer(self, body, status=200, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def says(text, **usage):
    return lambda handler: handler.answer(completion(text, **usage))


def judges(recorder):
    """Says what a function of the request says."""
    return lambda handler: handler.answer(completion(recorder(handler.asked)))


def fails(status, *headers, body=b"no"):
    return lambda handler: handler.answer(body, status, headers)


def sends(body):
    return lambda handler: handler.answer(body)


def hangs_up(handler):
    handler.connection.close()


def cuts_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')


def sleeps(handler):
    time.sleep(5)
    handler.answer(completion("late"))


def trickles(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)
