"""The audit of dependencies, with the real pip-audit against a service on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).parents[2]


@contextmanager
def advisories(known: dict[str, list[dict[str, Any]]], status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """An OSV service that knows these, by package name; yields its URL and the names that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(query["package"]["name"])
            answer = json.dumps({"vulns": known[asked[-1]]} if asked[-1] in known else {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        server.server_close()


def audit(url: str, *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), "--osv-url", url, "--timeout", "60", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0].lower() for line in lines if "==" in line and not line.startswith("#")}


def fault(package: str, version: str, fixed: str) -> dict[str, Any]:
    events = [{"introduced": "0"}, {"fixed": fixed}]
    return {
        "id": "PYSEC-2030-1",
        "summary": "for this test",
        "details": "for this test",
        "published": "2030-01-01T00:00:00Z",
        "affected": [
            {
                "package": {"name": package, "ecosystem": "PyPI"},
                "ranges": [{"type": "ECOSYSTEM", "events": events}],
                "versions": [version],
            }
        ],
    }


def test_a_known_vulnerability_fails_with_its_id_and_every_pin_is_asked_for() -> None:
    version = next(
        line.partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("safetensors==")
    )
    with advisories({"safetensors": [fault("safetensors", version, "99.0")]}) as (url, asked):
        assert audit(url) == (1, [f"safetensors {version}: PYSEC-2030-1, fixed in 99.0"])
        assert {name.lower().replace("_", "-").replace(".", "-") for name in asked} == {
            name.replace("_", "-").replace(".", "-") for name in pinned()
        }
        status, lines = audit(url, "--ignore-vuln", "PYSEC-2030-1")
    assert status == 0 and lines == [f"no known vulnerability in {len(pinned())} packages"]


def test_no_answer_is_a_warning_and_no_failure() -> None:
    with advisories({}, status=503) as (url, _):
        status, lines = audit(url)
        assert status == 0 and len(lines) == 1 and lines[0].startswith("warning: constraints.txt was not audited: ")
    status, lines = audit(url)  # nobody listens there any more
    assert status == 0 and len(lines) == 1 and lines[0].startswith("warning: constraints.txt was not audited: ")


def test_a_question_that_cannot_be_asked_is_a_failure() -> None:
    status, lines = audit("http://127.0.0.1:9/v1/query", "--no-such-option")
    assert status == 2 and len(lines) == 1 and lines[0].startswith("constraints.txt cannot be audited: ")
