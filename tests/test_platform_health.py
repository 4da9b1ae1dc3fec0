"""Ray is lost: noticed, raised once, after what is under way; and what a run still saves."""

import threading
import time
from types import SimpleNamespace

import pytest

from apportion.edges import tell, told_first
from apportion.loop.rescue import save_after_loss
from apportion.platform import health
from apportion.platform.cluster import Actor, Call, gather
from apportion.platform.errors import ActorError, ApportionError, ClusterLost
from apportion.platform.health import Problem, Watch, finishing


class Probe:
    """Says what is set, to whoever asks."""

    def __init__(self, problem: Problem | None = None) -> None:
        self.problem, self.asked = problem, 0

    def __call__(self) -> Problem | None:
        self.asked += 1
        return self.problem


@pytest.fixture
def watching(monkeypatch):
    """Start a watch that asks every 20 ms."""
    gave_up: list[str] = []

    def start(probe: Probe, ray_ends_after: float = 60.0) -> Watch:
        watch = Watch(probe, ray_ends_after, gave_up.append, every=0.02)
        watch.gave_up = gave_up
        health.watch(watch)
        return watch

    yield start
    health.watch(None)


def wait_for(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def call_of(future) -> Call:
    ref = type("Ref", (), {"future": lambda self: future})()
    return Call(Actor("policy-0", None, "none.log"), "update", [ref])


def test_a_loss_is_raised_once_by_whoever_waits(watching):
    from concurrent.futures import Future

    watching(Probe(Problem("Ray's raylet (pid 7) died")))
    with pytest.raises(ClusterLost, match=r"^Ray's raylet \(pid 7\) died$"):
        gather([call_of(Future())], 30, "rollout of step 1")
    done = Future()
    done.set_result("saved")
    assert gather([call_of(done)], 30, "checkpoint of step 1") == ["saved"]  # actors still answer


def test_a_wait_after_the_loss_ends_before_ray_ends_the_process(watching, monkeypatch):
    from concurrent.futures import Future

    monkeypatch.setattr(health, "MARGIN_SECONDS", 0.5)
    watching(Probe(Problem("gone")), ray_ends_after=2.0)
    wait_for(lambda: health.lost() is not None)
    with pytest.raises(ClusterLost):
        health.check()
    start = time.monotonic()
    with pytest.raises(ActorError, match=r"no answer within"):
        gather([call_of(Future())], 1800, "checkpoint of step 1")
    assert time.monotonic() - start < 2.0


def test_a_problem_that_passes_is_no_loss(watching):
    probe = Probe(Problem("no answer", seconds=0.3))
    watch = watching(probe)
    wait_for(lambda: probe.asked > 2)
    probe.problem = None
    asked = probe.asked
    wait_for(lambda: probe.asked > asked + 1)
    probe.problem = Problem("no answer", seconds=0.3)
    health.check()
    start = time.monotonic()
    wait_for(lambda: watch.lost is not None)
    assert time.monotonic() - start > 0.2


def test_an_update_under_way_may_end_before_the_loss_is_raised(watching):
    watching(Probe(Problem("gone")), ray_ends_after=60.0)
    with finishing():
        wait_for(lambda: health.lost() is not None)
        health.check()
    with pytest.raises(ClusterLost) as lost:
        health.check()
    assert lost.value.between_steps


def test_an_update_that_does_not_end_in_time_leaves_nothing_to_save(watching):
    watching(Probe(Problem("gone")), ray_ends_after=0.5)
    with pytest.raises(ClusterLost) as lost, finishing():
        while True:
            health.check()
            time.sleep(0.01)
    assert not lost.value.between_steps


def test_a_main_thread_that_hangs_in_ray_is_given_up(watching, monkeypatch):
    monkeypatch.setattr(health, "HUNG_SECONDS", 0.1)
    watch = watching(Probe(Problem("gone")))
    wait_for(lambda: watch.gave_up == ["gone"])


def test_a_deadline_holds_without_any_answer_of_ray():
    from concurrent.futures import Future

    start = time.monotonic()
    with pytest.raises(ActorError, match=r"^a test: no answer within 0 s from policy-0 \(update\); "):
        gather([call_of(Future())], 0.2, "a test")
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize("failing", [None, ActorError("policy-0 died"), OSError(28, "No space left on device")])
def test_what_was_trained_is_saved_and_the_loss_stays_the_error(failing):
    said: list[str] = []

    def write() -> None:
        if failing:
            raise failing

    save_after_loss(ClusterLost("Ray's raylet died"), write, said.append)
    assert said[0] == "Ray's raylet died; saving what was trained, then the run ends"
    assert said[1:] == ([] if failing is None else [f"the checkpoint could not be written: {failing}"])


def test_weights_of_a_step_that_did_not_end_are_not_saved():
    lost = ClusterLost("Ray's raylet died")
    lost.between_steps = False
    said: list[str] = []
    save_after_loss(lost, pytest.fail, said.append)
    assert said == ["Ray's raylet died; an update was under way, so what the ranks hold now cannot be saved"]


def test_an_error_is_printed_before_the_tear_down_and_once(capsys):
    seen: list[str] = []

    def tear_down() -> None:
        seen.append(capsys.readouterr().err)

    class Tracker:
        def close_console(self) -> None:
            seen.append("table closed")

    with pytest.raises(ApportionError) as caught:
        try:
            with told_first(Tracker()):
                raise ActorError("rollout-0: died\nits last words")
        finally:
            tear_down()
    tell(caught.value)
    assert seen == ["table closed", "error: rollout-0: died\nits last words\n"]
    assert capsys.readouterr().err == ""


def test_a_gcs_that_does_not_answer_is_lost_after_a_third_of_the_time_that_ray_waits(monkeypatch):
    import ray

    def silent(timeout):
        raise TimeoutError("deadline exceeded\nat some line")

    node = SimpleNamespace(gcs_address="127.0.0.1:1", get_session_dir_path=lambda: "/tmp/ray/session")
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    client = SimpleNamespace(gcs_client=SimpleNamespace(get_all_node_info=silent))
    monkeypatch.setattr(ray._private.worker, "global_worker", client)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    assert health.ray_probe(True, 60.0)() == health.Problem(
        "Ray's control server (GCS) at 127.0.0.1:1 does not answer (deadline exceeded); Ray's logs are in "
        "/tmp/ray/session/logs; resume the run",
        20.0,
    )
    assert health.ray_probe(True, 600.0)().seconds == 200.0  # set for a GCS that is restarted


def test_a_watch_ends_with_its_cluster(watching):
    watching(Probe())
    health.watch(None)
    assert "cluster-watch" not in [thread.name for thread in threading.enumerate()]
    assert health.lost() is None and health.seconds_left() == float("inf")
