"""The page's web application: its answers, and what it refuses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the page needs isthmus[web]")
from helpers import ROOT
from starlette.testclient import TestClient

from coordinator.messages import Answer
from coordinator.records.folder import METRICS
from netem.changes import Change, Cut
from netem.errors import ConfigError
from node.config import load_config
from node.watch.page.access import WRONG_IN_A_MINUTE, Access, Keys
from node.watch.page.app import STATIC, Page
from node.watch.page.source import Source

HOST = "127.0.0.1:7080"
KEYS = Keys("read-secret", "control-secret")


class Coordinator:
    """Stands for the run's coordinator."""

    def __init__(self) -> None:
        self.asked: list[Change | None] = []

    def ask(self, change: Change | None) -> Answer:
        self.asked.append(change)
        if isinstance(change, Cut) and "node-9" in change.ends:
            raise ConfigError("the coordinator refuses: 'node-9' matches no node")
        return Answer(step=3, at_s=1.5, network="cut", past=[], coming=[], confirmed=["node-0", "node-1"], silent=[])


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def visitor(tmp_path: Path, coordinator: Coordinator) -> Iterator[TestClient]:
    lines = [{"step": step, "time": float(step), "loss": 2.5, "nodes": {"node-0": {}}} for step in (1, 2)]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Source(tmp_path, load_config(None, []))
    page = Page(tmp_path, source, Access(KEYS, [HOST]), "isthmus_7080", coordinator.ask)
    with TestClient(page.application(), base_url=f"http://{HOST}") as client:
        for _ in range(100):
            if source.state.step == 2:
                break
            client.get("/healthz")
        yield client


def log_in(visitor: TestClient, secret: str) -> dict[str, Any]:
    answer = visitor.post("/api/login", json={"secret": secret})
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_nothing_of_the_run_without_a_secret(visitor: TestClient) -> None:
    for path in ("/api/run", "/api/stream", "/api/trace", "/api/trace/1", "/api/network", "/metrics"):
        answer = visitor.get(path)
        assert answer.status_code == 401, path
        assert "2.5" not in answer.text
    assert visitor.post("/api/network", json={"reset": True}).status_code == 403
    assert visitor.post("/api/login", json={"secret": "guess"}).status_code == 401
    assert visitor.get("/healthz").text == "ok"


def test_a_reader_sees_and_cannot_change(visitor: TestClient, coordinator: Coordinator) -> None:
    session = log_in(visitor, KEYS.read)
    assert not session["controls"]
    found = visitor.get("/api/run").json()
    assert found["header"]["step"] == 2
    assert found["header"]["loss"] == 2.5
    headers = {"X-Isthmus-CSRF": session["csrf"]}
    assert visitor.post("/api/network", json={"reset": True}, headers=headers).status_code == 403
    assert coordinator.asked == []


def test_an_operator_cuts_a_link(visitor: TestClient, coordinator: Coordinator) -> None:
    session = log_in(visitor, KEYS.control)
    assert session["controls"]
    change = {"cut": ["node-0", "node-1"]}
    assert visitor.post("/api/network", json=change).status_code == 403  # without the token of the session
    answer = visitor.post("/api/network", json=change, headers={"X-Isthmus-CSRF": session["csrf"]})
    assert answer.status_code == 200
    assert answer.json()["confirmed"] == ["node-0", "node-1"]
    assert coordinator.asked == [Cut(ends=("node-0", "node-1"))]


def test_a_program_uses_the_secret_itself(visitor: TestClient) -> None:
    control, read = ({"Authorization": f"Bearer {secret}"} for secret in (KEYS.control, KEYS.read))
    assert visitor.get("/api/network", headers=read).json()["step"] == 3
    assert visitor.post("/api/network", json={"heal": True}, headers=control).status_code == 200
    assert visitor.post("/api/network", json={"heal": True}, headers=read).status_code == 403
    metrics = visitor.get("/metrics", headers=read)
    assert "isthmus_step 2.0" in metrics.text
    assert 'isthmus_node_up{node="node-0"}' in metrics.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rate": "fast"}, "rate"),
        ({"rate": "1 Mbit/s", "cut": ["node-0", "node-1"]}, "either rate or latency"),
        ({"cat": 1}, "cat"),
        ({"cut": ["node-0", "node-9"]}, "matches no node"),
    ],
)
def test_a_mistake_is_told_in_one_line(visitor: TestClient, change: dict[str, Any], reason: str) -> None:
    answer = visitor.post("/api/network", json=change, headers={"Authorization": f"Bearer {KEYS.control}"})
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_another_host_and_another_sites_requests_are_refused(visitor: TestClient) -> None:
    assert visitor.get("/", headers={"Host": "evil.example"}).status_code == 403
    headers = {"Origin": "http://evil.example"}
    assert visitor.post("/api/login", json={"secret": KEYS.read}, headers=headers).status_code == 403


def test_what_is_no_json_or_too_long_is_refused(visitor: TestClient) -> None:
    assert visitor.post("/api/login", content=b"secret=x").status_code == 400
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[]", b"[" * 10_000, b'{"secret": "' + b"x" * 20_000 + b'"}'):
        assert visitor.post("/api/login", content=body, headers=headers).status_code == 400


def test_guessing_ends(visitor: TestClient) -> None:
    for _ in range(WRONG_IN_A_MINUTE):
        visitor.post("/api/login", json={"secret": "guess"})
    assert visitor.post("/api/login", json={"secret": KEYS.control}).status_code == 429


def test_every_answer_has_the_security_headers_and_the_page_needs_no_inline_script(visitor: TestClient) -> None:
    answer = visitor.get("/")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "'unsafe" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    cookie = visitor.post("/api/login", json={"secret": KEYS.read}).headers["Set-Cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    for name in ("page.js", "page.css", "uplot.min.js", "uplot.min.css"):
        assert visitor.get(f"/static/{name}").status_code == 200
    assert "<script>" not in (STATIC / "index.html").read_text()
    assert visitor.get("/static/../app.py").status_code == 404


def test_the_grafana_board_asks_only_for_figures_that_there_are(visitor: TestClient) -> None:
    board = json.loads((ROOT / "deploy/grafana/isthmus.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"isthmus_\w+", target["expr"])
    }
    exposed = visitor.get("/metrics", headers={"Authorization": f"Bearer {KEYS.read}"}).text
    known = set(re.findall(r"^# TYPE (isthmus_\w+)", exposed, re.MULTILINE))
    absent = {"isthmus_heldout_loss"}  # this run has had no evaluation
    assert asked
    assert asked - known <= absent
