"""launch/tpu_resume.sh over simulated preemptions: what it does, in which order, and when it stops."""

import pytest
from launch_fakes import Cloud

ARGS = ["--name=pod", "--zone=z", "--type=v4-32", "--spot", "--project=p"]
PROGRAM = ["--", "--config=configs/coco.py", "--config.note=it's $HOME"]
KINDS = {"queued-resources delete": "delete", "queued-resources create": "create", "tpu-vm scp": "setup",
         "worker.sh run": "run", "worker.sh status": "look"}  # fmt: skip
NOT_FOUND = [1, "ERROR: (gcloud) NOT_FOUND: Resource 'pod' was not found"]
ACTIVE, RUNNING, LOST = [0, "ACTIVE"], [0, "status: running\nstatus: running"], [255, "no route to host"]


def ended(*codes) -> list:
    return [0, "Using ssh batch size of 2.\n" + "\n".join(f"status: {code}" for code in codes)]


def resume(tmp_path, states, looks, *args, **plan):
    """Result, the kinds of commands in order, and the cloud."""
    answers = {"queued-resources describe": states, "worker.sh status": looks}
    cloud = Cloud(tmp_path / "cloud", answers | {"tpu-vm describe": [[0, "READY"]]} | plan)
    result = cloud.run("tpu_resume.sh", *ARGS, *args, *PROGRAM)
    lines = [" ".join(command) for command in cloud.log("sleep")]
    kinds = [kind for line in lines for part, kind in KINDS.items() if part in line]
    return result, kinds, cloud


def test_a_taken_slice_is_replaced_and_the_same_command_run_again(tmp_path):
    states = [ACTIVE, ACTIVE, [0, "SUSPENDING"], [0, "SUSPENDING"], [0, "SUSPENDED"], NOT_FOUND,
              [0, "PROVISIONING"], ACTIVE]  # fmt: skip
    looks = [RUNNING, RUNNING, LOST, RUNNING, ended(0, 0)]
    result, kinds, cloud = resume(tmp_path, states, looks)
    assert result.returncode == 0, result.stderr
    expected = "run look look look delete create setup run look look"
    assert kinds == expected.split()
    runs = [command for command in cloud.log() if any("worker.sh run" in part for part in command)]
    assert runs[0] == runs[1] and "--spot" in next(c for c in cloud.log() if "create" in c)


def test_the_dry_run_prints_what_a_preempted_run_executes(tmp_path):
    states = [[0, "SUSPENDED"], [0, "SUSPENDED"], NOT_FOUND, ACTIVE]
    result, kinds, cloud = resume(tmp_path, states, [ended(0)])
    assert result.returncode == 0 and kinds == ["delete", "create", "setup", "run", "look"]
    printed = cloud.printed("tpu_resume.sh", *ARGS, *PROGRAM)
    assert {tuple(command) for command in cloud.log("sleep")} == set(map(tuple, printed))


def test_without_a_request_it_starts_from_nothing(tmp_path):
    result, kinds, _ = resume(tmp_path, [NOT_FOUND, NOT_FOUND, NOT_FOUND, ACTIVE], [ended(0)])
    assert result.returncode == 0 and kinds == ["create", "setup", "run", "look"]


@pytest.mark.parametrize("codes, code, message", [
    ([0, 0], 0, ""), ([2, 2], 2, "mend"), ([70, 75], 70, "failed"),
])  # fmt: skip
def test_it_stops_where_running_again_is_no_use(tmp_path, codes, code, message):
    result, kinds, _ = resume(tmp_path, [ACTIVE], [RUNNING, ended(*codes)])
    assert result.returncode == code and kinds == ["run", "look", "look"]
    assert message in result.stderr and result.stderr.count("\n") == (1 if code else 0)


@pytest.mark.parametrize("codes", [(75, 75), (0, 134), (1, 1), ("none", 75)])
def test_a_run_that_ended_early_is_started_again_on_the_same_slice(tmp_path, codes):
    result, kinds, _ = resume(tmp_path, [ACTIVE], [ended(*codes), ended(0, 0)])
    assert result.returncode == 0 and kinds == ["run", "look", "run", "look"]


def test_it_waits_while_any_worker_runs(tmp_path):
    result, kinds, _ = resume(tmp_path, [ACTIVE], [ended(75, "running"), ended(0, "running"), ended(0, 0)])
    assert result.returncode == 0 and kinds == ["run", "look", "look", "look"]


def test_attempts_are_bounded(tmp_path):
    result, kinds, _ = resume(tmp_path, [ACTIVE], [ended(75)], "--attempts=3")
    assert result.returncode == 75 and kinds == ["run", "look"] * 3
    assert "gave up after 3 attempts" in result.stderr


def test_a_broken_connection_alone_changes_nothing(tmp_path):
    states = [ACTIVE, ACTIVE, ACTIVE, [1, "no network"], ACTIVE]
    result, kinds, _ = resume(tmp_path, states, [LOST, LOST, RUNNING, ended(0)])
    assert result.returncode == 0 and kinds == ["run", "look", "look", "look", "look"]


def test_a_slice_that_cannot_be_reached_for_long_costs_an_attempt(tmp_path):
    result, kinds, _ = resume(tmp_path, [ACTIVE], [LOST], "--attempts=1")
    assert result.returncode == 75 and kinds == ["run"] + ["look"] * 30


def test_machines_gone_under_an_active_request_are_noticed(tmp_path):
    node = {"tpu-vm describe": [[0, "PREEMPTED"], [0, "PREEMPTED"], [0, "READY"]]}
    states = [ACTIVE, ACTIVE, NOT_FOUND, ACTIVE]
    result, kinds, _ = resume(tmp_path, states, [ended(0)], **node)
    assert result.returncode == 0 and kinds == ["delete", "create", "setup", "run", "look"]


def test_a_slice_that_was_never_set_up_is_set_up_after_the_first_failure(tmp_path):
    runs = {"worker.sh run": [[127, "no such file"], [0, ""]]}
    result, kinds, _ = resume(tmp_path, [ACTIVE], [ended(0)], **runs)
    assert result.returncode == 0 and kinds == ["run", "setup", "run", "look"]


def test_another_run_on_the_slice_is_left_alone(tmp_path):
    result, kinds, _ = resume(tmp_path, [ACTIVE], [RUNNING], **{"worker.sh run": [[3, "a run is alive"]]})
    assert result.returncode == 3 and kinds == ["run"] and "another run" in result.stderr


def test_a_request_that_fails_is_deleted_and_made_again(tmp_path):
    states = [NOT_FOUND, NOT_FOUND, NOT_FOUND, [0, "FAILED"], [0, "FAILED"], NOT_FOUND, ACTIVE]
    result, kinds, _ = resume(tmp_path, states, [ended(0)])
    assert result.returncode == 0 and kinds == ["create", "delete", "create", "setup", "run", "look"]


def test_without_permission_it_says_so_at_once(tmp_path):
    result, kinds, _ = resume(tmp_path, [[1, "PERMISSION_DENIED"]], [RUNNING])
    assert result.returncode == 1 and kinds == [] and "PERMISSION_DENIED" in result.stderr
