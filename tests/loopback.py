"""A web server on loopback, for what is fetched."""

import functools
import http.server
import threading


class Server:
    """Serves whatever is put into its folder."""

    def __init__(self, folder, handler=None):
        self.folder = folder
        handler = functools.partial(handler or QuietHandler, directory=folder)
        self.http = QuietServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}"

    def put(self, content, name="archive.tar.gz"):
        (self.folder / name).write_bytes(content)
        return f"{self.url}/{name}"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # a client that hangs up early is a test's business, not ours


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
