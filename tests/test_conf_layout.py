"""A checkpoint resumes on as many ranks and under the same engine; anything else is refused before an actor starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from apportion.cli import compose_config, main, to_config
from apportion.conf.layout import check_layout, layout_of
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import ConfigError

RECIPE = ["experiment=tiny_ppo", "cluster.policy_ranks=2", "policy.zero_stage=2"]
ADAPTED = ["policy.lora.rank=4", "policy.lora.targets=[v_proj,q_proj]"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config_of(*words: str):
    return to_config(compose_config([*RECIPE, *words]))[0]


def a_run(*words: str, critic: bool = True) -> Path:
    """A run's newest checkpoint, written under the recipe and `words`."""
    folder = Path("runs/first")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    with CheckpointStore(folder / "checkpoints").writing(2) as inside:
        RunState(2, 2, {"seed": 0}, ranks=layout_of(config_of(*words), critic)).save(inside)
    return folder / "checkpoints" / "step-000002"


def older(ranks: int, *engine: str) -> Path:
    """A checkpoint whose state does not say what wrote it: only its files do."""
    folder = Path("old")
    for role in ("policy", "critic"):
        (folder / role / "engine").mkdir(parents=True)
        for rank in range(ranks):
            (folder / role / f"random-rank-{rank}.npz").write_bytes(b"")
        for name in engine:
            (folder / role / "engine" / name).write_bytes(b"")
    RunState(2, 2, {}).save(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["cluster.policy_ranks=1"], "cluster.policy_ranks: got 1, and the policy of {0} was written with 2: its optimizer "
         "state cannot be read otherwise; expected 2, or a new run from its weights (model.path={0}/model)"),
        (["policy.zero_stage=3"], "policy.zero_stage: got 3, and the policy of {0} was written with 2: "),
        (["policy.zero_stage=0"], "policy.zero_stage: got 0, and the policy of {0} was written with 2: its optimizer state "
         "cannot be read otherwise; expected 1 or 2, or "),
        (["critic.zero_stage=1"], "critic.zero_stage: got 1, and the critic of {0} was written with 0: "),
        (["model.dtype=float16"], "model.dtype: got float16, and the policy of {0} was written with "),
        (["policy.offload_optimizer=true"], "policy.offload_optimizer: got true, and the policy of {0} was written with false"),
        (ADAPTED, "policy.lora: got rank 4 on q_proj, v_proj, and the policy of {0} was written with null: "),
    ],
)  # fmt: skip
def test_what_the_ranks_cannot_read_is_refused_with_what_the_checkpoint_was_written_with(words, line):
    folder = a_run()
    with pytest.raises(ConfigError) as refused:
        check_layout(folder, layout_of(config_of(*words), critic=True))
    assert str(refused.value).startswith(line.format(folder)) and "\n" not in str(refused.value)


def test_a_stage_that_is_left_to_a_gpu_is_refused_where_an_older_run_wrote_another():
    folder = older(2, "mp_rank_00_model_states.pt")
    words = ["policy.zero_stage=null", "cluster.gpus_per_policy_rank=1"]
    with pytest.raises(ConfigError) as refused:
        check_layout(folder, layout_of(config_of(*words)))
    assert str(refused.value) == (
        "policy.zero_stage: got 2, and the policy of old was written with 0: its optimizer state cannot be read otherwise; "
        "expected 0, or a new run from its weights (model.path=old/model); policy.zero_stage=null is 2 on GPUs and 0 on CPUs"
    )
    check_layout(folder, layout_of(config_of("policy.zero_stage=null")))  # on CPUs as it always was
    check_layout(folder, layout_of(config_of("policy.zero_stage=0", words[1])))


def test_what_the_ranks_can_read_goes_on():
    folder = a_run(*ADAPTED)
    for words in ([], ["policy.zero_stage=1"], ["policy.lora.alpha=9"], ["policy.lora.targets=[q_proj,v_proj]"]):
        check_layout(folder, layout_of(config_of(*ADAPTED, *words), critic=True))
    check_layout(folder, layout_of(config_of(*ADAPTED), critic=False))  # its critic is of no use any more


def test_a_method_with_a_critic_does_not_go_on_from_a_run_without_one():
    folder = a_run(critic=False)
    with pytest.raises(
        ConfigError, match=r"^resume: .*step-000002 has no critic, expected a checkpoint of a run that trains"
    ):
        check_layout(folder, layout_of(config_of(), critic=True))


@pytest.mark.parametrize(
    ("ranks", "files", "refused"),
    [
        (
            1,
            ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"],
            "policy_ranks: got 2, and",
        ),
        (2, ["mp_rank_00_model_states.pt"], "zero_stage: got 2, and the policy of old was written with 0"),
        (
            2,
            ["zero_pp_rank_0_mp_rank_00_model_states.pt"],
            "zero_stage: got 2, and the policy of old was written with 3",
        ),
        (2, ["bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], None),
        (0, [], None),  # it says nothing
    ],
)
def test_an_older_checkpoint_is_known_by_its_files(ranks, files, refused):
    folder = older(ranks, *files)
    wanted = layout_of(config_of("critic.zero_stage=2"), critic=True)
    if refused is None:
        check_layout(folder, wanted)
    else:
        with pytest.raises(ConfigError, match=refused):
            check_layout(folder, wanted)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_the_command_refuses_another_number_of_ranks_at_once(command, capsys, monkeypatch):
    from apportion import build

    monkeypatch.setattr(build, "train", lambda *_: pytest.fail("the run was built"))
    folder = a_run()
    assert main([command, *RECIPE, "resume=first", "cluster.policy_ranks=1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: cluster.policy_ranks: got 1, and the policy of {folder.resolve()} was written with 2: "
    )
    assert main(["plan", *RECIPE, "resume=first"]) == 0


def test_a_preference_stage_refuses_it_before_its_data_are_read(monkeypatch):
    from apportion import preference_build

    monkeypatch.setattr(preference_build, "_examples", lambda *_: pytest.fail("data were read"))
    a_run()
    words = ["model.path=builtin:tiny", "data.train=pairs.jsonl", "resume=first", "policy.zero_stage=2"]
    with pytest.raises(ConfigError, match=r"^cluster\.policy_ranks: got 1, and the policy of "):
        preference_build.train(*to_config(compose_config(words, stage="dpo")))
