"""An object store on this machine: gcp-storage-emulator in a process of its own, with faults on demand.

`python -m tests.object_store` serves a new store on a free port and prints its URL. The process ends when its standard
input is closed, so it does not outlive the tests. The fixtures `object_store` (one per test session) and `bucket` (one
per test) are offered to all tests by conftest.py. `bucket.env` is the environment in which tensorstore and gcsfs of a
child process use the store; the fixture sets the same in this process.

Beyond the emulator, the server checks the preconditions ifGenerationMatch and ifMetagenerationMatch, returns the
generation of an object that it sends, moves objects, cancels uploads, and injects faults (`Bucket.inject`).
"""

import contextlib
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass

import pytest

FAULTS = ("400", "429", "500", "503", "timeout", "closed_before", "closed_after", "slow")
HOLD_SECONDS = 60.0  # a request that times out is held this long, unless the test sets another time

ALWAYS = {  # read when the clients are imported
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs requests the bucket's type over gRPC
    "GOOGLE_CLOUD_PROJECT": "test",
    # No credentials are looked up
    "FSSPEC_GCS_TOKEN": "anon",
    "NO_GCE_CHECK": "true",
    "GCE_METADATA_ROOT": "localhost:1",
}


@dataclass(frozen=True)
class ObjectStore:
    """A running server.

    url: of the server, `http://localhost:PORT`. env: environment variables of its clients.
    """

    url: str

    @property
    def env(self):
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            **ALWAYS,
        }

    def call(self, method, path, values=None):
        """The JSON answer to a request."""
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None


@dataclass(frozen=True)
class Bucket:
    """A bucket of a store, empty at the start of a test."""

    store: ObjectStore
    name: str

    @property
    def url(self):
        return f"gs://{self.name}"

    @property
    def env(self):
        return self.store.env

    def inject(self, kind, times=1, match=".*", skip=0, seconds=HOLD_SECONDS):
        """Makes requests to this bucket fail; several faults may be active at once.

        Args:
          kind: one of FAULTS. A number: this HTTP status, nothing is done. timeout: no answer for `seconds`, nothing is
            done, then the connection is closed. closed_before: the connection is closed after half of the request's
            body was read, nothing is done. closed_after: the request is carried out and the connection closed without
            an answer. slow: carried out after `seconds`.
          times: number of requests; None: all until `clear`.
          match: regular expression of "METHOD path?query", searched.
          skip: number of matching requests to carry out first.
        """
        assert kind in FAULTS, kind
        fault = {"kind": kind, "times": times, "match": match, "skip": skip, "seconds": seconds, "bucket": self.name}
        self.store.call("POST", "/faults", fault)

    def clear(self):
        """Ends all faults."""
        self.store.call("DELETE", "/faults")

    def requests(self):
        """(method, path, fault or "") of the requests to this bucket so far, oldest first."""
        return [tuple(each) for each in self.store.call("GET", "/requests") if self.name in each[1]]

    def objects(self):
        """Content of every object by its name, read around all faults."""
        return {
            name: urllib.request.urlopen(
                f"{self.store.url}/content/{self.name}/{urllib.parse.quote(name, safe='')}", timeout=60
            ).read()
            for name in self.store.call("GET", f"/names/{self.name}")
        }


@contextlib.contextmanager
def serving():
    """An ObjectStore served by a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.object_store"],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    try:
        url = process.stdout.readline().strip()
        assert url, "the object store did not start"
        yield ObjectStore(url)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture(scope="session")
def object_store():
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    with serving() as store:
        yield store


@pytest.fixture
def bucket(object_store, monkeypatch):
    for name, value in object_store.env.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex[:12]}"
    object_store.call("POST", "/storage/v1/b?project=test", {"name": name})
    made = Bucket(object_store, name)
    yield made
    made.clear()


# ---------------------------------------------------------------------------------------------------------------
# The server


class _State:
    def __init__(self):
        self.lock = threading.Lock()  # the emulator serves one request at a time
        self.faults, self.requests = [], []

    def fault_of(self, line):
        """The fault of a request, and counts it."""
        with self.lock:
            for fault in self.faults:
                if fault["bucket"] not in line or not re.search(fault["match"], line):
                    continue
                if fault["skip"]:
                    fault["skip"] -= 1
                elif fault["times"] is None or fault["times"] > 0:
                    fault["times"] = None if fault["times"] is None else fault["times"] - 1
                    return fault
        return None


def _handler_class():
    from gcp_storage_emulator.server import RequestHandler

    class Handler(RequestHandler):
        """The emulator's handler behind faults and preconditions."""

        timeout = 120
        disable_nagle_algorithm = True

        def __init__(self, state, *args):
            self.state, self.answer = state, None
            super().__init__(*args)

        def do_GET(self):
            self.serve(super().do_GET)

        def do_POST(self):
            self.serve(super().do_POST)

        def do_PUT(self):
            self.serve(super().do_PUT)

        def do_PATCH(self):
            self.serve(super().do_PATCH)

        def do_DELETE(self):
            self.serve(super().do_DELETE)

        def serve(self, carry_out):
            path = urllib.parse.urlsplit(self.path).path
            if self.control(path):
                return
            line = f"{self.command} {urllib.parse.unquote(self.path)}"
            fault = self.state.fault_of(line)
            kind = fault["kind"] if fault else ""
            self.state.requests.append((self.command, urllib.parse.unquote(self.path), kind))
            if kind == "slow":
                time.sleep(fault["seconds"])
            elif kind == "timeout":
                time.sleep(fault["seconds"])
                return self.hang_up()
            elif kind == "closed_before":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                return self.hang_up()
            elif kind.isdigit():
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return self.refuse(int(kind), "injected")
            sent, self.wfile = self.wfile, _Buffer()
            try:
                with self.state.lock:
                    if self.precondition_fails(path):
                        self.rfile.read(int(self.headers.get("Content-Length") or 0))
                        self.refuse(412, "conditionNotMet")
                    elif self.command == "DELETE" and "upload_id=" in self.path:
                        self.refuse(499, "cancelled")  # the emulator has neither this request nor the next
                    elif not self.move(path):
                        carry_out()
                answer = self.wfile
            finally:
                self.wfile = sent
            if kind == "closed_after":
                return self.hang_up()
            self.wfile.write(answer.content)

        def control(self, path):
            """Answers the requests that are about the server itself."""
            state, parts = self.state, [urllib.parse.unquote(part) for part in path.split("/")[1:]]
            if (self.command, path) == ("POST", "/faults"):
                fault = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with state.lock:
                    state.faults.append(fault)
                self.reply(200, b"")
            elif (self.command, path) == ("DELETE", "/faults"):
                with state.lock:
                    state.faults.clear()
                self.reply(200, b"")
            elif path == "/requests":
                self.reply(200, json.dumps(state.requests).encode())
            elif parts[0] == "names":
                with state.lock:
                    names = sorted(self.storage.objects.get(parts[1], {}))
                self.reply(200, json.dumps(names).encode())
            elif parts[0] == "content":
                with state.lock:
                    content = self.storage.get_file(parts[1], parts[2])
                self.reply(200, content if isinstance(content, bytes) else content.encode())
            else:
                return False
            return True

        def precondition_fails(self, path):
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            found = re.fullmatch(r".*/b/([^/]+)/o(?:/(.+))?", path)
            if not found:
                return False
            name = urllib.parse.unquote(found[2]) if found[2] else query.get("name", [""])[0]
            stored = self.storage.objects.get(found[1], {}).get(name, {})
            for key, field in (("ifGenerationMatch", "generation"), ("ifMetagenerationMatch", "metageneration")):
                if key in query and query[key][0] != str(stored.get(field, "0")):
                    return True
            return False

        def move(self, path):
            """Moves an object, if the request is for that."""
            found = re.fullmatch(r".*/b/([^/]+)/o/(.+)/moveTo/o/(.+)", path)
            if not found:
                return False
            bucket, old, new = (urllib.parse.unquote(part) for part in found.groups())
            if old not in self.storage.objects.get(bucket, {}):
                self.refuse(404, "notFound")
                return True
            content = self.storage.get_file(bucket, old)
            moved = self.storage.get_file_obj(bucket, old) | {"name": new, "generation": str(time.time_ns())}
            self.storage.create_file(bucket, new, content, moved)
            self.storage.delete_file(bucket, old)
            self.reply(200, json.dumps(moved).encode())
            return True

        def send_header(self, keyword, value):
            super().send_header(keyword, value)
            if keyword == "Content-Length" and self.command == "GET":
                found = re.fullmatch(r".*/b/([^/]+)/o/(.+)", urllib.parse.urlsplit(self.path).path)
                stored = found and self.storage.objects.get(found[1], {}).get(urllib.parse.unquote(found[2]))
                if stored:
                    super().send_header("x-goog-generation", stored["generation"])

        def refuse(self, status, reason):
            error = {"error": {"code": status, "message": reason, "errors": [{"reason": reason, "message": reason}]}}
            self.reply(status, json.dumps(error).encode())

        def reply(self, status, content):
            self.send_response(status)
            http.server.BaseHTTPRequestHandler.send_header(self, "Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def hang_up(self):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

        def log_message(self, *_):
            pass

    return Handler


class _Buffer:
    """Collects an answer."""

    def __init__(self):
        self.content = b""

    def write(self, part):
        self.content += part

    def flush(self):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        del request, client_address  # clients that a test kills hang up


def main():
    from gcp_storage_emulator.storage import Storage

    class Volatile(Storage):
        def _write_config_to_file(self):
            """Nothing is kept for a later process; the emulator would write the names of all objects at each change."""

    storage = Volatile(use_memory_fs=True)
    server = _Server(("localhost", 0), functools.partial(_handler_class(), _State(), storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://localhost:{server.server_address[1]}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
