"""A whole run with fake secrets in its environment, addresses, headers, parameters and errors leaves none of them anywhere."""

import base64
import json
import os
import shutil
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from run_commands import COMMON, starting

from apportion.platform.cluster import ActorRequest, Cluster
from apportion.platform.errors import ActorError
from apportion.platform.known_secrets import known
from apportion.platform.process import ActorBase

pytestmark = pytest.mark.system

PEM = ["MIIEowIBAAKCAQEAfake0123456789", "qLrStUvWxYzFAKEfake9876543210=="]
ENVIRONMENT = {  # what a variable holds: the secrets in it
    "FAKE_AWS_SECRET": ("wJalr/UtnFEMI+K7MDENG", ["wJalr/UtnFEMI+K7MDENG"]),
    "FAKE_HF_TOKEN": ("it's a \"quoted\" one\\n", ["it's a \"quoted\" one\\n"]),
    "REWARD_HEADER": ("Bearer words without numbers", ["words without numbers"]),
    "JUDGE_ACCESS": ("judge access by words", ["judge access by words"]),
    "DATABASE_URL": ("postgres://me:Data%2Fbase77@h/db", ["Data%2Fbase77", "Data/base77"]),
    "FAKE_SIGNING_KEY": ("-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join(PEM) + "\n-----END RSA PRIVATE KEY-----", PEM),
    "WANDB_API_KEY": ("0a1b2c3d4e" * 4, ["0a1b2c3d4e" * 4]),
    "SERVICE_PIN": ("90817263", ["90817263"]),
}  # fmt: skip
PARAMS = {
    "password": "ParamPass7788", "api_keys": ["KeyList5566", "KeyList6655"], "openai_key": "OpenAi-Plain-1",
    "headers": {"X-Key": "HeaderVal3344"}, "key": "Zk3Lq9Xw1", "passphrase": "correct horse staple",
}  # fmt: skip
SETTINGS = [
    "ParamPass7788", "KeyList5566", "KeyList6655", "OpenAi-Plain-1", "HeaderVal3344", "Zk3Lq9Xw1", "correct horse staple",
    "UrlPass2200", "QueryKey1100", "JudgePass3311", "JudgeQuery4422",
]  # fmt: skip
SHAPES = [  # in the texts of errors alone: nothing names these beforehand
    ("hf_" + "FakeFakeFakeFake01", "hf_FakeFake"), ("AKIA" + "FAKEFAKEFAKE0123", "AKIAFAKE"), ("curl -u me:CurlPass0011 http://h", "CurlPass0011"),
    ("Cookie: sid=CookieVal5", "CookieVal5"), ("SECRET_KEY='ShapeKey99'", "ShapeKey99"), ("http://h/x?api%5Fkey=Percent44", "Percent44"),
]  # fmt: skip
REWARDS = """
import base64, json, logging, os, sys, urllib.parse
from pathlib import Path

SHAPES = (Path(__file__).parent / "shapes.txt").read_text()
calls = 0


def leaky(prompts, completions, password, api_keys, openai_key, headers, key, passphrase, **columns):
    params = dict(password=password, api_keys=api_keys, openai_key=openai_key, headers=headers, key=key, passphrase=passphrase)
    values = {name: os.environ[name] for name in os.environ if name in NAMES}
    basic = base64.b64encode(f"me:{password}".encode()).decode()
    said = f"{values} {json.dumps(values)} {params} Basic {basic} {urllib.parse.urlencode(values)} {SHAPES}"
    print("printed", said, *values.values())
    print("printed", said, file=sys.stderr)
    logging.getLogger("users").error("logged %s", said)
    global calls
    calls += 1
    if len(completions) > 1 or calls % 4 == 0:
        raise ValueError("\\n".join([said, *values.values()]))
    return [0.0]


def length(prompts, completions, **columns):
    return [len(set(text)) / 8 for text in completions]
""".replace("NAMES", repr(tuple(ENVIRONMENT)))
WORDS = [
    "train", "experiment=tiny_grpo", *COMMON, "algorithm=capo", "tracking.console=true", "tracking.plots=true", "tracking.wandb=offline",
    "tracking.tensorboard=true", "rollout.engine=transformers", "train.steps=2", "checkpoint.final=false", "reward.max_failed_share=1", "judge.max_failed_share=1",
    "judge.outage_seconds=0", "judge.model=m", "judge.retries=0", "judge.api_key_env=JUDGE_ACCESS", "run_name=leaky",
    "judge.url=http://judge:JudgePass3311@127.0.0.1:9/v1?key=JudgeQuery4422",
]  # fmt: skip


def forms(secret: str) -> set[bytes]:
    data = secret.encode()
    texts = {
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
    }
    coded = {base64.b64encode(b"me:" + data)[4:-4], base64.b64encode(data)[:-4], data.hex().encode()}
    return {text.encode() for text in texts} | {code for code in coded if len(code) >= 8}


class Service(BaseHTTPRequestHandler):
    """Answers with a reward; every fifth time it fails and shows what it was sent."""

    asked = 0

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        Service.asked += 1
        failed = Service.asked % 5 == 0
        body = f"refused: {self.path} {self.headers}" if failed else '{"rewards": [0.5]}'
        self.send_response(400 if failed else 200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *words):
        pass


def links(source: Path, kept: Path, over: threading.Event) -> None:
    """Keep Ray's logs, which it removes in the end: a second name for each file as it appears."""
    while not over.wait(0.2):
        for file in source.glob("ray/session_2*/logs/**/*"):
            there = kept / "-".join(file.parts[3:])
            if file.is_file() and not there.exists():
                try:
                    os.link(file, there)
                except OSError:
                    continue


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run's output, and the folders with all that it leaves."""
    folder, kept = tmp_path_factory.mktemp("secrets"), tmp_path_factory.mktemp("kept")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "shapes.txt").write_text(" ".join(text for text, _ in SHAPES))
    service = '{urls: ["http://svc:UrlPass2200@127.0.0.1:PORT/x?key=QueryKey1100"], batch_size: 1, retries: 0, outage_seconds: 0, auth_env: REWARD_HEADER}'
    params = (
        "{"
        + ", ".join(
            f"{name}: {json.dumps(value) if name != 'headers' else '{X-Key: HeaderVal3344}'}"
            for name, value in PARAMS.items()
        )
        + "}"
    )
    functions = f"reward.functions=[{{function: '{folder}/rewards.py:leaky', params: {params}}}, {{function: '{folder}/rewards.py:length'}}, {service}]"
    short, over = Path(tempfile.mkdtemp(dir="/tmp")), threading.Event()
    keeper = threading.Thread(target=links, args=(short, kept, over))
    keeper.start()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    functions = functions.replace("PORT", str(server.server_port))
    try:
        with starting(folder) as start:
            environment = {name: value for name, (value, _) in ENVIRONMENT.items()}
            run = start(*WORDS, functions, RAY_TMPDIR=str(short), **environment).finished()
    finally:
        server.shutdown()
        over.set()
        keeper.join()
        shutil.rmtree(short, ignore_errors=True)
    return run, folder / "runs" / "leaky", kept


def test_twenty_secrets_are_left_nowhere(left):
    run, folder, kept = left
    assert run.code == 0, run.output
    secrets = (
        [secret for _, found in ENVIRONMENT.values() for secret in found] + SETTINGS + [secret for _, secret in SHAPES]
    )
    assert len(secrets) >= 20
    files = [run.output_file, *(f for root in (folder, kept) for f in root.rglob("*") if f.is_file())]
    names = {f.name for f in files}
    assert {
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "config.yaml",
        "tokens.html",
        "reward-0.log",
        "judge-0.log",
    } <= names
    assert any(name.endswith(".wandb") for name in names) and any("raylet" in name for name in names), names
    found = [
        (str(file), secret)
        for file in files
        for secret in secrets
        for form in forms(secret)
        if form in file.read_bytes()
    ]
    assert found == []


def test_what_is_no_secret_is_there(left):
    """The test above would pass for a run that says nothing."""
    run, folder, _ = left
    log = (folder / "logs" / "reward-0.log").read_text()
    assert (
        "REWARD_HEADER" in log and log.count("printed {'") >= 2 and "logged {'" in log and "Basic bWU6<redacted>" in log
    )
    warnings = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["warnings"]
    assert any("ValueError: {'" in text and "'password': '<redacted>'" in text for text in warnings), warnings
    assert "ValueError: {'" in run.output


class Unmade(ActorBase):
    def __init__(self, settings):
        raise ValueError(f"cannot log in with {settings['password']} or {os.environ['PLAIN_NAME']}")


def test_what_a_constructor_raises_is_in_no_log_of_rays(tmp_path, monkeypatch):
    short, kept, over = Path(tempfile.mkdtemp(dir="/tmp")), tmp_path / "kept", threading.Event()
    kept.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    monkeypatch.setenv("PLAIN_NAME", "plain words only")
    known.learn(settings := {"password": "ParamPass7788", "auth_env": "PLAIN_NAME"})
    keeper = threading.Thread(target=links, args=(short, kept, over))
    keeper.start()
    cluster = Cluster(None, "unmade", 1, tmp_path / "logs", None)
    try:
        with pytest.raises(ActorError) as caught:
            cluster.start([ActorRequest("unmade-0", Unmade, (settings,))], 60)
        time.sleep(2)  # for Ray to write it down
    finally:
        cluster.shutdown()
        over.set()
        keeper.join()
        shutil.rmtree(short, ignore_errors=True)
    assert "ValueError: cannot log in with <redacted> or <redacted>" in str(caught.value)
    files = [file for file in (*kept.rglob("*"), *(tmp_path / "logs").rglob("*")) if file.is_file()]
    assert len(files) > 5
    for file in files:
        assert b"ParamPass7788" not in file.read_bytes() and b"plain words only" not in file.read_bytes(), file
