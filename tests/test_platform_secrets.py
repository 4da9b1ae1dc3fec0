"""Which keys, texts and values are secrets, in which forms they are masked, and what is left as it is."""

import ast
import base64
import html
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

import apportion
from apportion.conf.explain import config_keys
from apportion.conf.preference_schema import STAGES
from apportion.conf.schema import Config
from apportion.platform.known_secrets import KnownSecrets, known, masked_pieces, redacted, redacted_text, without_known
from apportion.platform.messages import quoted, say, shortened
from apportion.platform.secret_shapes import is_secret_key
from apportion.platform.streams import MaskedStream, mask_output

GONE = "<redacted>"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+AbCdEf0123456789\nqqWWeeRRttYY==\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "key",
    [
        "api_keys", "openai_key", "key", "keys", "secrets", "tokens", "pwd", "passphrase", "bearer", "cookie", "pin", "pw",
        "apiKey", "APIKey", "OPENAI_API_KEY", "HF_TOKEN", "client-secret", "dbpassword", "mytoken", "accessToken",
        "AWS_SECRET_ACCESS_KEY", "proxy-authorization", "ssh_key", "credentials", "hf_tokens", "X-Key", "cookies", "auth",
    ],
)  # fmt: skip
def test_these_keys_hold_secrets(key):
    assert is_secret_key(key)
    assert redacted({"params": {key: "abc"}}) == {"params": {key: GONE}}
    assert redacted({"params": {key: ["abc", "d"]}}) == {"params": {key: GONE}}


@pytest.mark.parametrize(
    "key",
    [
        "max_prompt_tokens", "eos_token", "stop_tokens", "max_tokens", "new_tokens", "tokens_per_second", "monkey", "keyword",
        "sort_key", "answer_key", "api_key_env", "auth_env", "spin", "turkey", "author", "compass", "passage", "secretary",
        "PWD", "OLDPWD", "tokenizer", "max_new_tokens", "special_tokens", "key_column", "pinned", "prompt_key", "per_token_kl",
        "solution_key", "chosen_key", "rejected_key", "ground_truth_key", "input_key", "image_keys", "task_key", "eot_token",
    ],
)  # fmt: skip
def test_these_keys_hold_none(key):
    assert not is_secret_key(key)
    assert redacted({"params": {key: "abc"}}) == {"params": {key: "abc"}}


def test_no_value_of_our_own_schema_is_taken_for_a_secret():
    keys = {key for kind in (Config, *STAGES.values()) for key in config_keys(kind)}
    assert len(keys) > 150
    assert [key for key in keys if is_secret_key(key)] == []


def test_every_header_is_a_secret_but_those_that_say_what_is_sent():
    headers = {
        "X-Key": "hello",
        "Ocp-Apim": "w",
        "Content-Type": "application/json",
        "Accept": "*/*",
        "User-Agent": "me",
    }
    assert redacted({"headers": headers}) == {
        "headers": {
            "X-Key": GONE, "Ocp-Apim": GONE, "Content-Type": "application/json", "Accept": "*/*", "User-Agent": "me",
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SECRET_KEY='a b/c+d'", f"SECRET_KEY='{GONE}'"),
        ("DATABASE_PWD=hunter2 x", f"DATABASE_PWD={GONE} x"),
        ("pwd=hunter2;host=h", f"pwd={GONE};host=h"),
        ("Server=h;User=u;Password=a1/b2==;Port=1", f"Server=h;User=u;Password={GONE};Port=1"),
        ("Cookie: sid=abc; theme=dark", f"Cookie: {GONE}"),
        ("Cookie: sid=abc SECRET_KEY='d e'", f"Cookie: {GONE} SECRET_KEY='{GONE}'"),
        ("Authorization: Bearer abc SECRET_KEY='d e'", f"Authorization: {GONE} SECRET_KEY='{GONE}'"),
        ("Set-Cookie: sid=abc; HttpOnly\nnext", f"Set-Cookie: {GONE}\nnext"),
        ("{'Cookie': 'sid=abc; theme=dark'}", f"{{'Cookie': '{GONE}'}}"),
        ("Authorization: Basic dXNlcjpwdw==", f"Authorization: {GONE}"),
        ("Authorization: Digest username=u, response=abc", f"Authorization: {GONE}, response=abc"),
        ("Proxy-Authorization: Basic dXNlcjpwdw==", f"Proxy-Authorization: {GONE}"),
        ("-H 'X-Api-Key: abc' -d x", f"-H 'X-Api-Key: {GONE}' -d x"),
        ("x-goog-api-key:abc", f"x-goog-api-key:{GONE}"),
        ("sent Bearer abc.def_123 to h", f"sent Bearer {GONE} to h"),
        ("AccountName=x;AccountKey=Zm9vYmFy+/==;EndpointSuffix=y", f"AccountName=x;AccountKey={GONE};EndpointSuffix=y"),
        ("curl -s -u user:pw http://h/x", f"curl -s -u {GONE} http://h/x"),
        ("curl --user 'user:p@w' http://h/x", f"curl --user '{GONE}' http://h/x"),
        ("tool --password hunter2 --n 1", f"tool --password {GONE} --n 1"),
        ("tool --api-key=abc --auth-token 'a b'", f"tool --api-key={GONE} --auth-token '{GONE}'"),
        ("GET /score?api%5Fkey=abc&n=1", f"GET /score?api%5Fkey={GONE}&n=1"),
        ("http://h/x?api%5Fkey=abc&n=1", f"http://h/x?api%5Fkey={GONE}&n=1"),
        ("http://h/x?n=1&access%2Dtoken=abc", f"http://h/x?n=1&access%2Dtoken={GONE}"),
        ("postgres://me:pa:ss@h:5/db", f"postgres://{GONE}@h:5/db"),
        ('    api_key = "abc def"', f'    api_key = "{GONE}"'),
        ("key=Zk3Lq9Xw1", f"key={GONE}"),
        ("{key: Zk3Lq9Xw1, n: 1}", f"{{key: {GONE}, n: 1}}"),
        ("pin=4711", f"pin={GONE}"),
        ("openai_key=abc", f"openai_key={GONE}"),
        ("reward.functions.0.params.tokens=[Zk3Lq9Xw1]", f"reward.functions.0.params.tokens=[{GONE}]"),
        ("a:\n  password: hunter2\n  n: 1", f"a:\n  password: {GONE}\n  n: 1"),
        (f"cannot load {PEM} now", f"cannot load {GONE} now"),
        (f"cannot load {PEM!r} now", f"cannot load '{GONE}' now"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEow+AbCdEf0123456789\n", GONE),
        ("https://hooks.slack.com/services/T0/B0/abcDEF", f"https://hooks.slack.com/services/{GONE}"),
    ],
)  # fmt: skip
def test_texts_lose_secrets_by_their_names(text, expected):
    assert redacted_text(text) == expected
    assert redacted_text(expected) == expected


@pytest.mark.parametrize(
    "secret",
    [
        "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q", "glpat-" + "Ab1Cd2Ef3Gh4Ij5Kl6Mn", "nvapi-" + "Ab1Cd2Ef3Gh4Ij5Kl6_-Mn",
        "gsk_" + "Ab1Cd2Ef3Gh4Ij5Kl6Mn", "r8_" + "Ab1Cd2Ef3Gh4Ij5Kl6Mn", "ASIA" + "ABCDEFGHIJKLMNOP", "AKIA" + "ABCDEFGHIJKLMNOP",
        "hf_" + "AbCdEfGhIjKlMnOpQr", "ghp_" + "Ab1Cd2Ef3Gh4Ij5Kl6Mn", "github_pat_" + "11ABCDEFG0abcdefghij", "gho_" + "A1" * 12,
        "xoxb-" + "123456789012-abc", "sk-" + "proj-Ab1Cd2Ef3Gh4Ij5K", "sk_live_" + "Ab1Cd2Ef3Gh4", "npm_" + "Ab1Cd2Ef3Gh4Ij5Kl6Mn",
        "dckr_pat_" + "Ab1Cd2Ef3Gh4Ij5Kl6", "SG." + "Ab1Cd2Ef3Gh4Ij5Kl6.Ab1Cd2Ef3Gh4Ij5Kl6", "pypi-" + "AgEIcHlwaS5vcmcCJ",
        "eyJhbGciOiJI" + ".eyJzdWIiOiIx.abc-DEF_1", "ya29." + "a0Ab1Cd2Ef3Gh4Ij5", "xai-" + "Ab1Cd2Ef3Gh4Ij5Kl6Mn",
    ],
)  # fmt: skip
def test_tokens_of_services_are_known_by_their_form(secret):
    for around in ("{}", "got '{}', expected", "x={};", "({})", '"{}"', "a\n{}\nb"):
        assert redacted_text(around.format(secret)) == around.format(GONE)


MIXED = "Nz7oyDDHDsZGay0zQ1"


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: {}", "invalid token '{}'", "login with password {} failed", "passwd:{}", "<password>{}</password>",
        "ValueError('token', '{}')", "password -> {}", "aws_secret_access_key = {}", "bearer {}", "passcode={}", "JSESSIONID={}",
        "//u:{}@host/a", "bob:{}@10.0.0.1:5432/db", r"http:\/\/a:{}@h/x", "http%3A%2F%2Fa%3A{}%40h", "?X-Amz-Signature={}&x=1", "se=x&sig={}",
        "AWS4-HMAC-SHA256 Credential=x, Signature={}",
    ],
)  # fmt: skip
def test_what_looks_like_nothing_else_is_masked_in_prose_too(text):
    assert MIXED not in redacted_text(text.format(MIXED)) and GONE in redacted_text(text.format(MIXED))


@pytest.mark.parametrize(
    "settings",
    [
        {"password1": MIXED}, {"api_token_2": MIXED}, {"secret_value": MIXED}, {"passcode": MIXED}, {"auth_header": MIXED},
        {"headers": f"X-Key: {MIXED}"}, {"headers": [f"X-Key: {MIXED}"]}, {"headers": [["X-Key", MIXED]]},
        {"env": [{"name": "API_KEY", "value": MIXED}]},
    ],
)  # fmt: skip
def test_lines_of_headers_pairs_and_numbered_names_are_secrets(settings):
    assert MIXED not in str(redacted({"params": settings}))
    own = KnownSecrets()
    own.learn({"params": settings})
    assert own.mask(f"refused: {MIXED}") == f"refused: {GONE}"


HARMLESS = [
    "token: 5 tokens", "token: the smallest unit", "pin the version", "pin: the version", "the key: value pairs", "key: value", "expected key=value: no key",
    "a mapping {key: value}", "key='\"a, b\"'", "tokens=128", "max_tokens=128, stop_token='</s>'", "kl_per_token=0.1",
    "Basic arithmetic problems", "the bearer of news", "Bearer certificates", "The password: say friend and enter.", "PWD=/home/me",
    "sorted(rows, key=len)", "sorted(rows, key=lambda row: row[1])", "key=itemgetter(1)", "{key: answer}", "pass=True, fail=0", "pass: 3/4",
    "docker run --user 1000:1000 x", "python -u train.py", "cookies are sweet", "Cookie monster", "secret santa", "a secret: yes", "auth: basic auth",
    "judge.api_key: got 5, expected text", "reward.functions.0.params.api_key: got <redacted>, expected it (params.api_key=...)",
    "judge.api_key=VALUE", "is a?key=1 a question", "2 + 2 = 4; x = 3", "token == '</s>'", "tokenizer.eos_token=</s>",
    "task-specific-fine-tuning-of-models", "sk-learn-and-other-libraries-too", "sha256:" + "0123456789abcdef" * 4, "step-000012/model",
    "Tokenizing: 100%|####| 10/10", "passage: It was a dark night", "token 5 of 10", "api_key_env: JUDGE_KEY", "{auth_env: REWARD_HEADER}",
    "The secret is to keep going.", "--max-tokens 128", "--tokenizer path", "1e-5 0.25 12345678", "key: 5", "{pin: 3}", "Answer: 42",
    "api_key: ${oc.env:KEY}", "export A_TOKEN=$B_TOKEN", "{api_key: file:key}", "password", "note: keep the token", "https://h/v1/models?page=2&limit=10", "me@host.org wrote: hi", "git@github.com:a/b.git",
]  # fmt: skip


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_stays_as_it_is(text):
    assert redacted_text(text) == text


def test_a_long_text_takes_no_long_time():
    for text in ("a" * 200_000, "api_" * 50_000, "key " * 50_000, "x=1 " * 50_000, "-----BEGIN PRIVATE KEY-----" * 2000, "{'" * 50_000,
                 "curl " * 20_000, "http://" * 20_000, "cookie" * 20_000, "-----BEGIN PRIVATE KEY-----!" * 7_000, "xapp-" * 20_000,
                 "sk-" * 30_000, "pypi-" * 20_000, "-eyJaaaaaaaa" * 15_000, "token=[a " * 10_000):  # fmt: skip
        start = time.perf_counter()
        redacted_text(text)
        assert time.perf_counter() - start < 3, text[:20]


VALUE = "s3/Kr\"e't+é\\x&y z"


def _forms(value: str) -> list[str]:
    data = value.encode()
    return [
        value, repr(value), repr(value + "'\""), json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(repr(value)),
        json.dumps(json.dumps(value)), quote(value), quote(value, safe=""), quote_plus(value), html.escape(value), data.hex(),
        base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode(),
        *(base64.b64encode(user + data).decode() for user in (b"u:", b"me:", b"usr:")),
        base64.b64encode(b"me:" + data + b"\n").decode(),
    ]  # fmt: skip


def test_a_known_value_is_masked_in_every_form_that_a_text_may_show():
    registry = KnownSecrets()
    registry.learn({"params": {"password": VALUE}})
    for form in _forms(VALUE):
        masked = registry.mask(f"<{form}>")
        assert GONE in masked and "s3/Kr" not in masked, form
        assert not any(form[at : at + 8] in masked for at in range(len(form) - 7)), form


def test_values_come_from_names_settings_and_addresses(monkeypatch):
    monkeypatch.setenv("MY_AWS_SECRET", "wJalrXUtnFEMI/K7MDENG/bPxRfiCY")
    monkeypatch.setenv("REWARD_HEADER", "Bearer plain-words-only")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxy%2Fpass@proxy:3128")
    monkeypatch.setenv("ACCOUNT_CREDENTIALS", json.dumps({"private_key": PEM, "type": "service"}))
    registry = KnownSecrets()
    registry.learn({
        "reward": {"functions": [{"auth_env": "REWARD_HEADER", "params": {"password": "hunter2", "headers": {"X-A": "abcdefg1"}}}]},
        "urls": ["http://u:user-part@h/x?sig=query%2Fv4lue"],
        "before": ["sft judge.api_key=from-the-words run_name=a"],
    })  # fmt: skip
    for secret in ("wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "plain-words-only", "proxy/pass", "proxy%2Fpass", "hunter2", "abcdefg1", "user-part",
                   "query/v4lue", "from-the-words", "MIIEow+AbCdEf0123456789", "qqWWeeRRttYY=="):  # fmt: skip
        assert registry.mask(f"it is {secret}!") == f"it is {GONE}!"
    assert registry.names() == "REWARD_HEADER"


def test_names_of_variables_reach_another_process_and_no_value_does(monkeypatch):
    first = KnownSecrets()
    first.learn({"judge": {"api_key_env": "JUDGE_ACCESS"}, "params": {"password": "open-sesame"}})
    monkeypatch.setenv("APPORTION_MASKED_VARIABLES", first.names())
    monkeypatch.setenv("JUDGE_ACCESS", "ordinary words here")
    other = KnownSecrets()
    assert first.names() == "JUDGE_ACCESS"
    assert other.mask("JUDGE_ACCESS said: ordinary words here") == f"JUDGE_ACCESS said: {GONE}"


def test_an_actor_learns_from_the_dataclasses_it_is_made_with():
    @dataclass
    class Entry:
        params: dict
        urls: list

    registry = KnownSecrets()
    registry.learn([[Entry({"password": "open-sesame-1"}, ["http://u:pass-word-2@h"])], 3.0, None])
    assert registry.mask("open-sesame-1 pass-word-2") == f"{GONE} {GONE}"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"password": "abc12"}, "abc12 is short"),
        ({"judge_api_key": "ollama"}, "http://ollama:11434/v1"),
        ({"wandb_api_key": "offline"}, "offline"),
        ({"password": "true"}, "true"),
        ({"pin": 4711}, "4711 of 47110"),
        ({"password": "swordfish"}, "two swordfishes"),
        ({"key": "answer"}, "the answer"),
        ({"key": "prompt text"}, "prompt text"),
        ({"token": "/tmp"}, "in /tmp"),
        ({"api_keys": ["default"]}, "the default"),
    ],
)
def test_values_that_would_hide_ordinary_words_are_left(settings, text):
    registry = KnownSecrets()
    registry.learn(settings)
    assert registry.mask(text) == text


def test_a_plain_word_is_masked_where_it_stands_alone():
    registry = KnownSecrets()
    registry.learn({"password": "swordfish"})
    assert registry.mask("login: swordfish.") == f"login: {GONE}."


def test_samples_keep_what_only_looks_like_a_secret_and_lose_what_is_known():
    known.learn({"password": "open-sesame-9"})
    row = {
        "response": "api_key=abc hf_AAAAAAAAAAAAAAAAAAAA open-sesame-9",
        "tokens": ["open", "-ses", "ame-", "9 it", " is"],
        "advantages": [0.5, None],
        "columns": {"open-sesame-9": "x"},
        "reward": 1.0,
    }
    assert without_known(row) == {
        "response": f"api_key=abc hf_AAAAAAAAAAAAAAAAAAAA {GONE}",
        "tokens": [GONE, "", "", " it", " is"],
        "advantages": [0.5, None],
        "columns": {GONE: "x"},
        "reward": 1.0,
    }
    twice = masked_pieces(list("open-sesame-9 and open-sesame-9"))
    assert len(twice) == 31 and "".join(twice) == f"{GONE} and {GONE}"
    known.learn({"pin": 90817263})
    assert masked_pieces(["open-sesame-9", "90817263", "x"]) == [GONE, GONE, "x"]
    assert masked_pieces(["a", "", "b"]) == ["a", "", "b"]


def test_a_shortened_text_holds_no_half_of_a_secret():
    known.learn({"password": "0123456789-abcdefghij-ABCDEFGHIJ"})
    assert known.mask("got '0123456789-abcdef...fghij-ABCDEFGHIJ'") == f"got '{GONE}...{GONE}'"
    assert known.mask("0123456789-") == "0123456789-"
    for before in range(60, 90):
        text = "x" * before + "0123456789-abcdefghij-ABCDEFGHIJ" + "y" * 90
        for shown in (shortened(text, 120), quoted(text)):
            assert "0123456789" not in shown and "ABCDEFGHIJ" not in shown


def test_the_beginning_of_an_accounts_json_is_no_secret(monkeypatch):
    account = {"type": "service_account", "private_key": "s3/Kr-et-of-an-account-0123456789"}
    monkeypatch.setenv("ACCOUNT_CREDENTIALS", json.dumps(account, indent=2))
    ordinary = '{\n  "type": "search_web", "private_parts": 0, "of": "service_account"}'
    assert KnownSecrets().mask(ordinary) == ordinary
    assert KnownSecrets().mask("it is s3/Kr-et-of-an-...") == f"it is {GONE}..."


def test_say_masks(capsys):
    known.learn({"password": "open-sesame-9"})
    say("it is open-sesame-9 at http://u:PW@h:1/x?key=K", sys.stderr)
    assert capsys.readouterr().err == f"it is {GONE} at http://{GONE}@h:1/x?key={GONE}\n"


def test_the_stream_masks_a_line_that_comes_in_pieces():
    known.learn({"password": "open-sesame-9"})
    behind = io.StringIO()
    stream = MaskedStream(behind)
    stream.write("it is open-")
    assert behind.getvalue() == ""
    print("sesame-9, pwd=", "x1y2", sep="", file=stream)
    assert behind.getvalue() == f"it is {GONE}, pwd={GONE}\n"
    stream.write("rest")
    stream.flush()
    assert behind.getvalue().endswith("\nrest")


def test_a_process_that_is_forked_while_another_thread_prints_can_print():
    stream = MaskedStream(io.StringIO())
    held, done = threading.Event(), threading.Event()

    def print_on() -> None:
        with stream._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=print_on)
    thread.start()
    held.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(10)
        stream.write("a line\n")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()


def test_the_stream_lets_nothing_turn_the_direction_of_writing():
    stream = io.StringIO()
    print("recipe: a\x9b31m\u202eb\x1b[32mgreen", file=MaskedStream(stream), flush=True)
    assert stream.getvalue() == "recipe: a31mb\x1b[32mgreen\n"


def test_loggers_warnings_and_tracebacks_are_masked(monkeypatch, capsys):
    known.learn({"password": "open-sesame-9"})
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("apportion-test-secrets")
    logger.addHandler(handler)
    try:
        mask_output()
        mask_output()
        assert isinstance(sys.stderr, MaskedStream) and not isinstance(sys.stderr.stream, MaskedStream)
        logger.warning("logged open-sesame-9")
        try:
            raise ValueError("raised open-sesame-9")
        except ValueError as error:
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        print("printed open-sesame-9")
        said = capsys.readouterr()
    finally:
        logger.removeHandler(handler)
    assert f"logged {GONE}" in said.err and f"ValueError: raised {GONE}" in said.err and "Traceback" in said.err
    assert said.out == f"printed {GONE}\n"


# Files that print past the exit, and why.
PRINTS = {
    "platform/messages.py": "the exit",
    "data/downloads.py": "a child's answer to its parent, as JSON",
    "data/template_child.py": "data knows nothing of platform; a traceback of our own code",
    "data/builtin.py": "data knows nothing of platform; a file's name and a process number",
    "actors/reward_guard.py": "a child that imports the standard library alone; names of functions",
    "conf/reference.py": "makes a page of the documentation",
    "platform/metric_names.py": "makes a page of the documentation",
}


def test_nothing_is_printed_past_the_exit():
    root = Path(apportion.__file__).parent
    found = {}
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print", "sys.stdout.write", "sys.stderr.write", "sys.__stdout__.write", "sys.__stderr__.write", "traceback.print_exc",
                "traceback.print_exception",
            ):  # fmt: skip
                found.setdefault(str(file.relative_to(root)), []).append(node.lineno)
    assert {file: lines for file, lines in found.items() if file not in PRINTS} == {}
    assert [file for file in PRINTS if file not in found] == []
