"""Models of the hub are fetched once, before actors start: with the real huggingface_hub and a hub on 127.0.0.1."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, Hub, serving

from apportion.assembly import downloads
from apportion.assembly.downloads import fetch_here, fetch_on_nodes, from_cache, hub_models, stage_models
from apportion.cli import compose_config, to_config
from apportion.data.builtin import resolve_model
from apportion.data.downloads import HubModel, _bytes_in, as_json, needed_files, needs_the_hub, on_hub
from apportion.platform.cluster import DOWNLOADING, Actor, ActorRequest, _late
from apportion.platform.errors import ConfigError
from apportion.platform.progress import Clocks

MODEL = HubModel("model.path", "owner/tiny")


def composed(*words, stage=None):
    experiment = ["experiment=tiny_grpo"] if stage is None else []
    return to_config(compose_config([*experiment, *words], stage=stage))[0]


@pytest.fixture(scope="module")
def config():
    return composed()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with builtin:tiny, in other formats as well; the cache is empty."""
    folder = tmp_path / "repository"
    shutil.copytree(resolve_model("builtin:tiny"), folder)
    for other in (
        "pytorch_model.bin",
        "m.gguf",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "modeling.py",
        "README.md",
    ):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"not for us")
    hub = Hub({"owner/tiny": folder, "owner/copy": folder, "owner/gated": 403, "owner/locked": 401})
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with serving(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield hub


def snapshot(tmp_path, name="owner/tiny"):
    return tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def test_only_what_is_read_is_fetched_and_only_once(hub, tmp_path, config, capsys):
    models = [MODEL, HubModel("reference.model", "owner/copy")]
    assert fetch_here(config, models) is True
    assert hub.weights == {"owner/tiny/model.safetensors": 1, "owner/copy/model.safetensors": 1}
    here = {file.name for file in snapshot(tmp_path).rglob("*") if file.is_file()}
    assert here == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert (snapshot(tmp_path).parent.parent / "refs" / "main").read_text() == COMMIT
    said = capsys.readouterr().out.splitlines()
    assert said == ["downloading owner/tiny: 6 files, 0.00 GiB", "downloading owner/copy: 6 files, 0.00 GiB"]
    assert fetch_here(config, models) is False  # nothing new
    assert sum(hub.weights.values()) == 2
    assert capsys.readouterr().out == ""


def test_what_is_fetched_loads_by_name_without_a_network(hub, config):
    """As actors with HF_HUB_OFFLINE do, by transformers and by the way that vLLM takes offline."""
    assert fetch_here(config, [MODEL]) is True
    program = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer, AutoConfig\n"
        "from huggingface_hub import snapshot_download\n"
        "print(sum(p.numel() for p in AutoModelForCausalLM.from_pretrained('owner/tiny').parameters()))\n"
        "print(len(AutoTokenizer.from_pretrained('owner/tiny')), AutoConfig.from_pretrained('owner/tiny').model_type)\n"
        "print(snapshot_download('owner/tiny', local_files_only=True, ignore_patterns='*', revision=None))\n"
    )
    before = sum(hub.gets.values())
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env={**__import__("os").environ, **downloads.OFFLINE, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert (lines[1], lines[2], lines[3].rpartition("/")[2]) == ("264", "llama", COMMIT)
    assert sum(hub.gets.values()) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/missing", "which is neither a folder here nor a model of the hub, expected owner/name"),
        ("owner/gated", "which is gated, expected access to it: accept its terms on the hub, and set HF_TOKEN"),
        ("owner/locked", "which is gated, expected access to it"),
        ("not/a/name", "which is neither a folder here nor a model of the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, config, name, expected):
    with pytest.raises(ConfigError) as caught:
        fetch_here(config, [HubModel("critic.model", name)])
    assert str(caught.value).startswith(f"critic.model: got {name}, {expected}")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_cache_serves_what_it_has_whole(hub, tmp_path, config, monkeypatch, capsys):
    assert fetch_here(config, [MODEL]) is True
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    capsys.readouterr()
    assert fetch_here(config, [MODEL]) is False
    assert capsys.readouterr().out.startswith("owner/tiny: the hub does not answer (")
    (snapshot(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        fetch_here(config, [MODEL])
    assert str(caught.value).startswith(
        "model.path: got owner/tiny, which is not whole in the cache, and the hub does not answer ("
    )
    assert str(caught.value).endswith("look at the network, a proxy and HF_ENDPOINT, or give a model's folder")


def test_offline_asks_nobody(hub, config, monkeypatch, capsys):
    assert fetch_here(config, [MODEL]) is True
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    capsys.readouterr()
    assert fetch_here(config, [MODEL]) is False
    assert capsys.readouterr().out == ""
    with pytest.raises(
        ConfigError, match=r"^model.path: got owner/copy, which is not whole in .* with HF_HUB_OFFLINE set, "
    ):
        fetch_here(config, [replace(MODEL, name="owner/copy")])


def test_a_download_that_takes_too_long_ends_with_the_key_to_change(hub, config):
    hub.delay = 30.0
    slow = replace(config.cluster, download_timeout_seconds=1.0)
    with pytest.raises(
        ConfigError,
        match=r"^cluster.download_timeout_seconds: got 1, in which owner/tiny did not come, .*; whole files stay in the cache$",
    ):
        fetch_here(SimpleNamespace(cluster=slow), [MODEL])


def test_a_download_ends_with_its_parent_and_leaves_no_part_of_a_file(hub, tmp_path):
    """Ctrl-C is the parent's: it reaches both, and only closing the input, or the parent's own end, stops a download."""
    hub.delay = 30.0
    child = subprocess.Popen(
        [sys.executable, "-m", "apportion.data.downloads"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        child.stdin.write(as_json([MODEL]) + "\n")
        child.stdin.flush()
        blobs = snapshot(tmp_path).parent.parent / "blobs"
        deadline = time.monotonic() + 60
        while not list(blobs.glob("*.incomplete")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(blobs.glob("*.incomplete"))
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert child.poll() is None
        _, complaint = child.communicate(timeout=10)  # closes its input
    finally:
        child.kill()
    assert (child.returncode, list(blobs.glob("*.incomplete")), complaint) == (1, [], "")


def test_a_part_that_is_renamed_while_it_is_counted_is_left_out(tmp_path, monkeypatch):
    for name in ("a", "b.incomplete"):
        (tmp_path / name).write_bytes(bytes(4096))
    entries = list(os.scandir(tmp_path))
    (tmp_path / "b.incomplete").unlink()
    monkeypatch.setattr(os, "scandir", lambda _: iter(entries))
    assert _bytes_in(tmp_path) == (tmp_path / "a").stat().st_blocks * 512 > 0


def test_in_a_joined_cluster_the_driver_fetches_no_weights(hub, tmp_path, config):
    joined = SimpleNamespace(cluster=replace(config.cluster, address="10.0.0.1:6379"))
    assert fetch_here(joined, [MODEL]) is True
    assert (hub.weights, (snapshot(tmp_path) / "tokenizer.json").is_file()) == ({}, True)


@pytest.mark.parametrize(
    ("files", "code", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], False, ["model.safetensors"]),
        (["pytorch_model-00001-of-00001.bin", "training_args.bin", "optimizer.pt"], False, ["pytorch_model-00001-of-00001.bin"]),
        (["model-00001-of-00001.safetensors", "model.fp16.safetensors"], False, ["model-00001-of-00001.safetensors"]),
        (["consolidated.safetensors", "model.safetensors"], False, ["model.safetensors"]),
        (["model.safetensors-00001-of-00001.safetensors"], False, ["model.safetensors-00001-of-00001.safetensors"]),
        (["merges.txt", "spiece.model", "vocab.bpe", "qwen.tiktoken"], False, ["merges.txt", "qwen.tiktoken", "spiece.model", "vocab.bpe"]),
        (["modeling.py", "parts/layer.py"], False, []),
        (["modeling.py", "parts/layer.py"], True, ["modeling.py", "parts/layer.py"]),
        (["additional_chat_templates/tools.jinja", "onnx/config.json"], False, ["additional_chat_templates/tools.jinja"]),
    ],
)  # fmt: skip
def test_which_files_a_model_needs(files, code, expected):
    assert needed_files(files, code) == expected


def test_the_models_that_a_run_loads(tmp_path):
    def found(*words, **kind):
        config = composed(*words, **kind)
        return [(m.key, m.name) for m in (hub_models(config) if not kind else stage_models(config))]

    assert found() == []  # built in
    assert found("model.path=owner/m") == [("model.path", "owner/m")]
    whole = ["experiment=tiny_ppo", "model.path=owner/m", "critic.model=owner/c", "reference.model=owner/m"]
    kl = ["algorithm.kl.place=loss", "algorithm.kl.coefficient=0.1"]
    assert found(*whole, *kl) == [("model.path", "owner/m"), ("critic.model", "owner/c")]  # the reference is the same
    reward = "reward.functions=[{function: 'model:owner/r', params: {trust_remote_code: true}}]"
    assert found(reward) == [("reward.functions model:owner/r", "owner/r")]
    assert hub_models(composed(reward))[0].remote_code is True
    data = ["data.train=p.jsonl", "model.path=owner/m"]
    assert found(*data, "dpo.reference=owner/r", stage="dpo") == [
        ("model.path", "owner/m"),
        ("dpo.reference", "owner/r"),
    ]
    assert found(*data, stage="sft") == [("model.path", "owner/m")]


def test_what_is_on_disk_is_not_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "m").mkdir(parents=True)
    assert [on_hub(p) for p in ("owner/m", "owner/x", "gpt2", "./x", "/x", "~/x", "builtin:tiny")] == [
        False, True, True, False, False, False, False,
    ]  # fmt: skip


ROLES = ("policy", "rollout", "judge", "reward", "credit", "environment", "reference")


def settings(requests):
    return {role: (asked[0].environment or {}).get("HF_HUB_OFFLINE") for role, asked in requests.items()}


def test_actors_load_from_the_cache_alone_and_the_users_code_keeps_the_network(hub, tmp_path, monkeypatch, config):
    requests = {role: [ActorRequest(f"{role}-0", object, environment={"A": "1"})] for role in ROLES}
    assert from_cache(requests, [], False, True) is requests  # no model of the hub: nothing changes
    fetch_here(config, [MODEL])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    changed = from_cache(requests, [MODEL], False, own_judge=True)
    assert settings(changed) == {
        **dict.fromkeys(ROLES, "1"), "reward": None, "credit": None, "environment": None,
    }  # fmt: skip
    assert changed["policy"][0].environment == {"A": "1", "HF_HUB_OFFLINE": "1"}
    assert settings(from_cache(requests, [MODEL], False, own_judge=False))["judge"] is None  # a function of the user's
    assert settings(requests) == dict.fromkeys(ROLES)
    assert from_cache(requests, [MODEL], True, True) is requests  # a node that comes later has fetched nothing
    # Where something is missing, or lies in another repository, actors may ask the hub.
    assert from_cache(requests, [MODEL, replace(MODEL, name="owner/copy")], False, True) is requests
    (snapshot(tmp_path) / "adapter_config.json").write_text("{}")
    assert needs_the_hub(snapshot(tmp_path))
    assert from_cache(requests, [MODEL], False, True) is requests


def test_code_of_another_repository_needs_the_hub(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.M"}, "x": "a--b"}')
    assert not needs_the_hub(tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "owner/other--modeling.M"}}')
    assert needs_the_hub(tmp_path)


class Nodes:
    """A joined cluster of fake nodes."""

    joined = True

    def __init__(self):
        self.launched, self.dismissed, self.asked = [], [], None

    def nodes(self, gpus):
        self.asked = gpus
        return ["node-a", "node-b"]

    def launch(self, requests):
        self.launched += requests
        return [SimpleNamespace(name=r.name, call=lambda method, models: (method, models)) for r in requests]

    def dismiss(self, actors):
        self.dismissed += [actor.name for actor in actors]


@pytest.mark.parametrize(("share", "only_gpus"), [(0.5, True), (0, False)])
def test_each_node_of_a_joined_cluster_fetches_for_itself(monkeypatch, share, only_gpus):
    cluster, waited = Nodes(), []
    monkeypatch.setattr(downloads, "gather", lambda calls, seconds, what: waited.append((calls, seconds, what)))
    requests = {"policy": [ActorRequest("policy-0", object, gpus=share)], "credit": [ActorRequest("credit-0", object)]}
    fetch_on_nodes(cluster, [MODEL], requests, 55.0)
    assert [(r.name, r.node, r.gpus) for r in cluster.launched] == [
        ("download-0", "node-a", 0),
        ("download-1", "node-b", 0),
    ]
    assert waited == [([("fetch", [MODEL])] * 2, 55.0, DOWNLOADING)]
    assert (cluster.asked, cluster.dismissed) == (only_gpus, ["download-0", "download-1"])


@pytest.mark.parametrize(
    ("role", "keys", "only_gpus"),
    [
        ("reward", ["model.path"], True),  # its functions load no model
        ("reward", ["model.path", "reward.functions model:owner/r"], False),
        ("judge", ["model.path"], True),  # a service
        ("judge", ["model.path", "judge.model"], False),
    ],
)
def test_what_loads_no_model_on_a_node_without_gpus_has_nothing_fetched_there(monkeypatch, role, keys, only_gpus):
    cluster = Nodes()
    monkeypatch.setattr(downloads, "gather", lambda *_: None)
    requests = {"policy": [ActorRequest("policy-0", object, gpus=1)], role: [ActorRequest(f"{role}-0", object)]}
    fetch_on_nodes(cluster, [HubModel(key, f"owner/{i}") for i, key in enumerate(keys)], requests, 55.0)
    assert cluster.asked == only_gpus


def test_a_ray_of_our_own_has_one_node_which_has_fetched(config):
    fetch_on_nodes(SimpleNamespace(joined=False), [MODEL], {}, 55.0)


def test_a_node_that_is_late_is_named_with_the_key_to_change():
    call = SimpleNamespace(actor=Actor("download-1", None, ""), method="fetch")
    text = _late([call], Clocks([""], 9.0), 9.0, DOWNLOADING)
    assert text.startswith(
        "download of models: no answer within 9 s from download-1 (fetch); raise cluster.download_timeout_seconds"
    )
