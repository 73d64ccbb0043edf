"""From raw tables to a served, watched endpoint whose alarms are acted upon."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from fusion.export.baseline import Baseline
from recsys.export import artifact_of
from recsys.run import Run
from serving.client import Client, Model

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def served(*arguments: Any) -> Iterator[dict[str, Any]]:
    """What `tools/serve.py` announces."""
    command = [sys.executable, "tools/serve.py", *map(str, arguments), "--port", "0", "--rest-port", "0", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            process.wait(60)


def get(facts: dict[str, Any], path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{facts['ports']['rest']}{path}", timeout=20) as answer:
        return str(answer.read().decode())


def alarms(facts: dict[str, Any]) -> list[str]:
    lines = get(facts, "/monitoring/prometheus/metrics").splitlines()
    return [line for line in lines if line.startswith("serving_alarms{")]


@pytest.mark.slow
def test_one_repository_from_tables_to_a_watched_endpoint(shop_run: Run, tmp_path: Path) -> None:
    """A9, P1 to P4: answers come with guidance beside them; users as in training raise no alarm, strangers do, and a
    member that an alarm names is left out from then on. P4: model card and API document."""
    assert {"report.html", "model_card.md"} <= {path.name for path in shop_run.folder.iterdir()}
    artifact = artifact_of(shop_run.folder)
    baseline = Baseline.read(artifact)
    assert baseline.rows == 100 and set(baseline.rates) >= {"unknown_user", "silent_text"}
    watch = tmp_path / "watch.yaml"
    rule = {"when": "rate", "series": "unknown_user", "do": ["log", {"drop_member": "popularity"}]}
    watch.write_text(json.dumps({"monitor": {"window": 200}, "rules": [rule]}), encoding="utf-8")
    users = pd.read_parquet(artifact / "users.parquet")["user_id"].tolist()
    with served(artifact, "--monitor", watch) as facts, client_of(facts) as client:
        document = json.loads(get(facts, "/openapi.json"))
        assert "/v1/recommend" in document["paths"]
        for turn in range(400):
            found = client.recommend(users[turn % len(users)], k=5)
        assert found.items and "popularity" in found.members_used
        assert alarms(facts) == []
        for turn in range(400):
            client.recommend(f"stranger {turn}", k=5)
        raised = alarms(facts)
        assert any('kind="rate",series="unknown_user"' in line for line in raised), raised
        assert "popularity" not in client.recommend(users[0], k=5).members_used


@pytest.mark.slow
def test_what_administration_orders_one_worker_every_worker_does(shop_run: Run, tmp_path: Path) -> None:
    """H7, P3, O10: a member that is dropped stays out of the answers of both workers, and of the one that takes the
    place of a dead one; labels reach them by the same means."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"me {hashlib.sha256(b's3cret').hexdigest()}\n", encoding="utf-8")
    artifact = artifact_of(shop_run.folder)
    user = pd.read_parquet(artifact / "users.parquet")["user_id"][0]
    admin = ("--admin-port", "0", "--admin-token-file", tokens)
    with served(artifact, "--name", "shop", "--workers", "2", "--no-monitor", *admin) as facts:

        def order(call: str, **body: Any) -> None:
            url = f"http://127.0.0.1:{facts['ports']['admin']}/v1/admin/{call}"
            headers = {"authorization": "Bearer s3cret", "content-type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=20):
                return

        def asked(label: str = "") -> set[bool]:
            """Whether the member is in the answers to many connections, of which each may meet another worker."""
            found = set()
            for _ in range(24):
                with client_of(facts) as client:
                    found.add(
                        "popularity" in client.recommend(user, k=5, model=Model("shop", label=label)).members_used
                    )
            return found

        def becomes(wanted: bool) -> None:
            limit = time.monotonic() + 30
            while asked() != {wanted} and time.monotonic() < limit:
                time.sleep(0.2)
            assert asked() == {wanted}

        assert asked() == {True}
        order("labels", label="stable", version=1)
        order("members", member="popularity", use=False)
        becomes(False)
        assert "serving_version_state" in get(facts, "/monitoring/prometheus/metrics")
        supervisor = psutil.Process(facts["processes"][0]).parent()
        assert supervisor is not None
        os.kill(facts["processes"][0], signal.SIGKILL)
        limit = time.monotonic() + 60
        while len(workers := listening(supervisor, facts) - {facts["processes"][0]}) < 2 and time.monotonic() < limit:
            time.sleep(0.2)
        assert len(workers) == 2
        assert asked("stable") == {False}
        order("members", model="shop", member="popularity", use=True)
        becomes(True)


def client_of(facts: dict[str, Any]) -> Client:
    """A client with a connection of its own."""
    return Client([f"127.0.0.1:{facts['ports']['grpc']}"], timeout=30)


def listening(supervisor: psutil.Process, facts: dict[str, Any]) -> set[int]:
    """The processes below a supervisor that answer on the port."""
    return {
        child.pid
        for child in supervisor.children()
        if child.status() != psutil.STATUS_ZOMBIE
        and any(c.laddr.port == facts["ports"]["grpc"] and c.status == "LISTEN" for c in child.net_connections("tcp"))
    }
