"""The checks for a real GPU: their parts on a CPU, and how they report what failed, was skipped or was late."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import gpu_parts
from benchmarks.gpu import apart, attention, head, memory, optimizer, packed, report, sampling, transfer, update
from benchmarks.gpu.device import driver, relative_error, stated_flops
from benchmarks.gpu.estimate import training_bytes
from benchmarks.gpu.report import Part, Record, Skipped, run_here

ROOT = Path(__file__).parent.parent
# What a machine with torch and transformers alone lacks.
LACKING = ("vllm", "ray", "deepspeed", "hydra", "omegaconf", "xxhash", "peft", "datasets", "wandb", "matplotlib")
REFUSE = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {LACKING!r} else super().find_spec(name, path, target)
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from benchmarks.gpu_parts import main
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(name, run, limit=60.0):
    return Part(name, f"what {name} does", run, limit)


# the report


def test_a_figure_beyond_its_bound_fails_its_part_by_name():
    def run(record: Record) -> None:
        record.say("speed", 1e9, "GB/s")
        record.hold("gap", 0.1, 0.1)
        record.hold("error", 0.11, 0.1)
        record.hold("not a number", float("nan"), 1)

    outcome = run_here(part("attention", run), "cpu")
    assert outcome.status == "failed"
    assert outcome.reason == "beyond its bound: error, not a number"
    assert [figure.ok for figure in outcome.figures] == [True, True, False, False]


def test_an_error_is_its_parts_alone_and_keeps_the_figures_before_it():
    def run(record: Record) -> None:
        record.say("first", 1)
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    outcome = run_here(part("broken", run), "cpu")
    assert (outcome.status, len(outcome.figures)) == ("failed", 1)
    assert outcome.reason.startswith("RuntimeError: CUDA error: an illegal memory access (test_benchmarks_gpu.py:")


def test_the_table_names_what_was_skipped_and_failed_and_why():
    def skip(record: Record) -> None:
        raise Skipped("needs a GPU")

    def fail(record: Record) -> None:
        record.hold("gap", 2.0, 1.0, "nats")

    outcomes = [run_here(part(*pair), "cpu") for pair in (("one", lambda r: None), ("two", skip), ("three", fail))]
    assert report.summary(outcomes) == "1 ok, 1 failed (three), 1 skipped (two)"
    assert report.exit_status(outcomes) == 1
    assert report.exit_status(outcomes[:2]) == 0
    lines = [" ".join(line.split()) for line in report.show(outcomes[2]).splitlines()]
    assert lines[1] == "gap 2 nats at most 1, FAILED"
    assert "needs a GPU" in report.show(outcomes[1])


def test_the_json_has_each_figure_with_what_was_expected_of_it():
    outcome = run_here(part("one", lambda record: record.hold("gap", 0.5, 1.0, "nats")), "cpu")
    written = json.loads(json.dumps(report.as_json("tool", {"device": "CPU"}, [outcome])))
    assert set(written) == {"tool", "date", "machine", "parts"}
    [only] = written["parts"]
    assert (only["part"], only["what"], only["status"], only["reason"]) == ("one", "what one does", "ok", "")
    assert only["figures"] == [{"name": "gap", "value": 0.5, "unit": "nats", "bound": 1.0, "ok": True}]


def test_an_unknown_part_is_refused_with_the_nearest(capsys):
    assert gpu_parts.main(["--device", "cpu", "heads"]) == 2
    assert "got 'heads', expected some of device, head" in (error := capsys.readouterr().err)
    assert "did you mean 'head'?" in error


# processes


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A module `fake_checks` in place of a driver, for a part's own process."""
    (folder / "fake_checks.py").write_text("import sys, time, os\nfrom pathlib import Path\n" + text)
    monkeypatch.setattr(apart, "ROOT", folder)


def test_a_late_part_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    text = f"import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nPath({str(pids)!r}).write_text(str(child.pid))\n"
    fake(tmp_path, monkeypatch, text + "time.sleep(60)\n")
    start = time.monotonic()
    outcome = apart.run_part_apart("fake_checks", part("slow", lambda r: None, 1.5), "cpu")
    assert (outcome.status, outcome.reason) == ("failed", "no end within 1.5 s")
    assert time.monotonic() - start < 20
    state, deadline = Path(f"/proc/{pids.read_text()}/stat"), time.monotonic() + 10

    def has_ended():
        return not state.exists() or state.read_text().split()[2] == "Z"

    while not has_ended() and time.monotonic() < deadline:  # a signal that was sent takes a moment
        time.sleep(0.05)
    assert has_ended()


def test_a_part_that_dies_is_reported_with_its_error_and_its_figures(tmp_path, monkeypatch):
    record = Record(part("dies", lambda r: None), "cuda", tmp_path / "left.json")
    record.say("before", 3.0)
    text = f"target = sys.argv[sys.argv.index('--out') + 1]\nPath(target).write_text({(tmp_path / 'left.json').read_text()!r})\n"
    fake(tmp_path, monkeypatch, text + "print('torch.AcceleratorError: CUDA error')\nprint('bye')\nos._exit(3)\n")
    outcome = apart.run_part_apart("fake_checks", part("dies", lambda r: None), "cuda")
    assert outcome.status == "failed"
    assert outcome.reason == "exit status 3: torch.AcceleratorError: CUDA error"
    assert [(figure.name, figure.value) for figure in outcome.figures] == [("before", 3.0)]


@pytest.mark.slow
def test_a_part_runs_in_its_own_process():
    outcome = apart.run_part_apart("benchmarks.gpu_parts", optimizer.OFFLOAD, "cpu")
    assert (outcome.status, outcome.figures) == ("skipped", [])
    assert "pinned host memory" in outcome.reason


@pytest.mark.slow
def test_the_parts_need_torch_and_transformers_alone(tmp_path):
    arguments = ["--device", "cpu", "--out", str(tmp_path / "out.json")]
    arguments += ["memory", "checksums", "varlen", "sampling"]
    code = f"{REFUSE}sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {p["part"]: p for p in json.loads((tmp_path / "out.json").read_text())["parts"]}
    assert {name: p["status"] for name, p in parts.items()} == {
        "memory": "ok", "checksums": "skipped", "varlen": "skipped", "sampling": "ok",
    }  # fmt: skip
    assert parts["checksums"]["reason"] == "needs the package xxhash"


# the parts


def figures(outcome: report.Outcome) -> dict[str, float | str]:
    assert outcome.status == "ok", outcome.reason
    return {figure.name: figure.value for figure in outcome.figures}


@pytest.mark.parametrize("module", [head, update, sampling], ids=lambda m: m.PART.name)
def test_a_part_holds_on_a_cpu(module):
    outcome = run_here(module.PART, "cpu")
    assert outcome.status == "ok", outcome.reason
    assert sum(figure.bound is not None for figure in outcome.figures) > 0


def test_the_head_is_failed_where_its_entropies_are_wrong(monkeypatch):
    class Wrong:
        @staticmethod
        def apply(*arguments):
            logprobs, entropies, normalizers = head_function.apply(*arguments)
            return logprobs, entropies + 0.1, normalizers

    head_function = head.PlainHeadLogprobs
    monkeypatch.setattr(head, "PlainHeadLogprobs", Wrong)
    outcome = run_here(head.PART, "cpu")
    assert outcome.reason.count("entropies") == 4 and "log-probs" not in outcome.reason


def test_sdpa_without_a_mask_gives_what_eager_gives():
    values = figures(run_here(attention.CAUSAL, "cpu"))
    assert values["float32, eager: kernels"] == "none"
    assert "flash_attention" in values["float32, sdpa: kernels"]


def test_shared_prompts_are_failed_where_the_mask_is_wrong(monkeypatch):
    assert figures(run_here(attention.TREE, "cpu"))["float32: relative error of the gradient"] < 1e-5
    monkeypatch.setattr("apportion.actors.microbatch.Tree.visible", property(plain_mask))
    assert "relative error of the gradient" in run_here(attention.TREE, "cpu").reason


def plain_mask(tree):
    """Causal, so that a response sees those before it."""
    size = tree.segments.shape[1]
    return torch.ones(len(tree.segments), 1, size, size, dtype=torch.bool).tril()


def test_a_loss_with_ratios_that_are_clipped_is_compared():
    batch, micros = update.made_micros("cpu", "tiny")
    learner = update.Learner(update.random_model("tiny", "cpu"), batch, "cpu", 16)
    learner.drift(micros)
    ratios = learner.score(micros) - batch.old_logprobs
    assert 0.02 < (abs(ratios) > 0.4).mean() < 0.3
    assert not ((abs(ratios) > 0.11) & (abs(ratios) < 0.4)).any()


def test_fused_and_foreach_adam_agree_and_another_rate_does_not(monkeypatch):
    assert figures(run_here(optimizer.ADAM, "cpu"))
    made = optimizer.flat_state
    rates = iter([1e-3, 2e-3])

    def other_rate(*arguments):
        parameter, adam = made(*arguments)
        adam.param_groups[0]["lr"] = next(rates)
        return parameter, adam

    monkeypatch.setattr(optimizer, "flat_state", other_rate)
    assert "largest difference of a weight" in run_here(optimizer.ADAM, "cpu").reason


def test_measured_states_are_what_the_parameters_say():
    measured, model = memory.measured_states("tiny", "cpu")
    count = sum(p.numel() for p in model.parameters())
    assert measured == {"weights": 2 * count, "masters": 4 * count, "gradients": 4 * count, "moments": 8 * count}


def test_checkpointing_keeps_fewer_activations():
    _, model = memory.measured_states("tiny", "cpu")
    whole = memory.measured_passes(model, "tiny", "cpu", 64, 16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    less = memory.measured_passes(model, "tiny", "cpu", 64, 16)
    # One input a layer, the last hidden states, and what the final norm keeps.
    assert less["activations, kept"] < 0.3 * whole["activations, kept"]


def test_the_estimate_is_asked_for_with_the_sizes_of_the_model():
    estimated = training_bytes("1.5B", 2048, 4096, True)
    assert estimated["weights"] == pytest.approx(2 * 1.54e9, rel=0.01)
    assert estimated["moments"] == pytest.approx(8 * 1.54e9, rel=0.01)


def test_weights_come_back_from_the_host_as_they_were():
    assert figures(run_here(transfer.HOST, "cpu"))["values that differ after both ways"] == 0
    assert figures(run_here(transfer.CHECKSUMS, "cpu"))["tensors whose checksum differs after packing"] == 0


@pytest.mark.slow
def test_another_process_gets_the_tensor_that_was_handed_over():
    values = figures(run_here(transfer.IPC, "cpu"))
    assert values["bytes that differ in the other process"] == 0


def test_what_only_a_gpu_has_is_skipped_by_name():
    for each in (packed.VARLEN, packed.FLEX, optimizer.OFFLOAD):
        outcome = run_here(each, "cpu")
        assert outcome.status == "skipped" and "GPU" in outcome.reason, each.name


def test_the_rule_of_a_shared_prompt_is_the_tree_mask():
    from apportion.actors.microbatch import Tree

    segments = torch.tensor([0, 0, 1, 1, 2, 2])
    tree = Tree(torch.zeros(1), 2, torch.zeros(1, 6), segments[None])
    sees = packed.tree_rule(segments)
    places = torch.arange(6)
    assert torch.equal(packed.mask_rule(sees)(0, 0, places[:, None], places[None, :]), tree.visible[0, 0])


def test_devices_are_found_by_name():
    assert stated_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert stated_flops("NVIDIA H100 PCIe") == 756e12
    assert stated_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert stated_flops("NVIDIA L40S") == 362e12
    assert stated_flops("Tesla T4") is None


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("580.82.07, 512", {"driver": "580.82.07", "used_mib": 512.0}),
        ("580.82.07, [N/A]", {"driver": "580.82.07"}),  # MIG, GB10
        ("580.82.07, [Not Supported]", {"driver": "580.82.07"}),
        ("", {}),
    ],
)
def test_the_driver_is_read_from_nvidia_smi(line, read, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{line}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert driver() == read


def test_relative_error_is_of_the_reference():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
