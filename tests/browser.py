"""A real browser for tests: headless Chromium, spoken to over its DevTools pipe."""

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
PATIENCE = 60  # seconds for any one answer


class Page:
    """A tab.

    Attributes:
      complaints: what the page logged: errors, warnings, and exceptions that nothing caught.
      requests: addresses that it asked for, its own among them.
    """

    def __init__(self, send: Any, receive: Any):
        self._send, self._receive = send, receive
        self._last = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Calls a method of the DevTools protocol; takes note of the events before its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send(message)
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, params: Any) -> None:
        if event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"{params['type']}: {params['args']}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {params['exceptionDetails']}")
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log: {params['entry']}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Returns when a JavaScript expression holds.

        Raises:
          TimeoutError: when it does not for a long time.
        """
        end = time.monotonic() + PATIENCE
        frame = "new Promise((done) => setTimeout(done, 20))"
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression}; the page says {self.complaints}")
            self.evaluate(frame)

    def show(self, path: Path, *, width: int, dark: bool) -> None:
        """Opens a file as a window of that width shows it, until its scripts have run."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("document.readyState === 'complete'")


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a new browser, which keeps its files in `folder`."""
    assert PROGRAM is not None
    to, back = folder / "to", folder / "back"
    for pipe in (to, back):
        os.mkfifo(pipe)
    # The protocol is on descriptors 3 and 4.
    shell = ["sh", "-c", 'exec "$@" 3<"$0/to" 4>"$0/back" 2>"$0/log"', str(folder)]
    command = [PROGRAM, *OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    with (
        subprocess.Popen([*shell, *command], stdout=subprocess.DEVNULL) as process,
        to.open("wb", buffering=0) as out,
        back.open("rb", buffering=0) as answers,
    ):
        try:
            yield Page(lambda m: out.write(json.dumps(m).encode() + b"\0"), _messages(answers))
        finally:
            process.kill()


def _messages(answers: Any) -> Callable[[], Any]:
    """What returns the next message of the browser."""
    selector = selectors.DefaultSelector()
    selector.register(answers, selectors.EVENT_READ)
    rest = b""

    def receive() -> Any:
        nonlocal rest
        while b"\0" not in rest:
            if not selector.select(PATIENCE):
                raise TimeoutError("the browser does not answer")
            part = answers.read(1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            rest += part
        message, _, rest = rest.partition(b"\0")
        return json.loads(message)

    return receive
