"""Scripts of launch/: the supervisor's restarts and signals, flags of the installed compiler, readable files."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.commands import CPU, PLAIN
from tests.conftest import ROOT

SCRIPTS = sorted(p.name for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))
QUICK = {**PLAIN, "MTP_RESTART_SECONDS": "0", "MTP_MAX_RESTARTS": "3"}
# Leaves with the codes given, one a start, and counts its starts in a file.
LEAVE = 'n=$(cat "$0" 2>/dev/null || echo 0); echo $((n + 1)) > "$0"; shift "$n"; exit "$1"'


def supervised(count, *codes):
    """(exit code, starts, stderr) of a supervised command that leaves with `codes`, one after the other."""
    command = ["launch/supervise.sh", "bash", "-c", LEAVE, str(count), *map(str, codes)]
    done = subprocess.run(command, cwd=ROOT, env=QUICK, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, int(count.read_text()), done.stderr


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [
        ([0], 0, 1),
        ([1, 0], 0, 2),
        ([134, 137, 0], 0, 3),
        ([75, 76, 0], 0, 3),  # preempted, a lost peer
        ([1, 130], 130, 2),  # Ctrl-C
        ([2], 2, 1),  # unusable arguments: the same again would fail the same
        ([1, 2], 2, 2),
        ([1, 1, 1, 3], 3, 4),  # given up
    ],
)
def test_the_supervisor_restarts_what_failed(tmp_path, codes, code, starts):
    found = supervised(tmp_path / "count", *codes)
    assert found[:2] == (code, starts), found
    assert ("given up after 3 restarts" in found[2]) == (code == 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_supervisor_passes_a_signal_on_and_starts_nothing_again(number):
    child = 'trap "echo saved; exit 75" TERM; echo ready; while :; do sleep 0.05; done'
    process = subprocess.Popen(
        ["launch/supervise.sh", "bash", "-c", child], cwd=ROOT, env=QUICK, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, number)
    assert process.communicate(timeout=30)[0] == "saved\n"
    assert process.returncode == 75


def test_the_supervisor_waits_longer_after_each_failure(tmp_path):
    (tmp_path / "sleep").write_text("#!/bin/bash\n")  # no test waits for it
    (tmp_path / "sleep").chmod(0o755)
    env = {**QUICK, "PATH": f"{tmp_path}:{PLAIN['PATH']}", "MTP_RESTART_SECONDS": "100", "MTP_MAX_RESTARTS": "5"}
    codes = ["1", "1", "1", "76", "1", "0"]
    command = ["launch/supervise.sh", "bash", "-c", LEAVE, str(tmp_path / "count"), *codes]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert re.findall(r"in (\d+) s", done.stderr) == ["100", "200", "300", "300", "100"]


def batch(tmp_path, srun, **env):
    """Starts launch/slurm.sbatch with `srun` as given, and a scontrol that records its arguments."""
    for name, text in (("srun", srun), ("scontrol", f'echo "$@" >> {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**QUICK, "PATH": f"{tmp_path}:{PLAIN['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", **env}
    return subprocess.Popen(
        ["bash", "launch/slurm.sbatch", "--config=c.py"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("code", "env", "is_requeued"),
    [
        (0, {}, False),
        (1, {}, False),
        (2, {}, False),
        (75, {}, True),
        (76, {}, True),
        (76, {"SLURM_RESTART_COUNT": "100"}, False),
        (130, {}, False),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_after_some_exit_codes(code, env, is_requeued, tmp_path):
    process = batch(tmp_path, f"exit {code}", **env)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert (tmp_path / "requeued").exists() == is_requeued


def test_a_slurm_job_that_is_told_to_stop_saves_and_goes_back_into_the_queue(tmp_path):
    process = batch(tmp_path, 'trap "exit 75" TERM; echo ready; while :; do sleep 0.05; done')
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_the_supervisor_requires_a_command():
    done = subprocess.run(["launch/supervise.sh"], cwd=ROOT, env=QUICK, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_well_formed(name):
    subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", f"launch/{name}"], cwd=ROOT, check=True)


def sourced(platform, name):
    command = f'. launch/xla_flags.sh {platform} && printf %s "${name}"'
    done = subprocess.run(["bash", "-uc", command], cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=True)
    return done.stdout


def test_this_jaxlib_supports_the_gpu_flags():
    flags = sourced("gpu", "XLA_FLAGS")
    code = "import jax; jax.devices()"
    env = {**CPU, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_tpu_flags_are_libtpus_and_a_wrong_platform_is_refused():
    assert all(flag.startswith(("--xla_tpu_", "--xla_enable_")) for flag in sourced("tpu", "LIBTPU_INIT_ARGS").split())
    assert sourced("tpu", "MTP_HEARTBEAT_SECONDS") == "30"
    done = subprocess.run(["bash", "-c", ". launch/xla_flags.sh abacus"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2


def test_tpu_vm_sends_arguments_to_every_worker_unharmed(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    gcloud.chmod(0o755)
    env = {**PLAIN, "PATH": f"{tmp_path}:{PLAIN['PATH']}", "TPU": "pod", "ZONE": "z"}
    glob = "--config.data.files='a b/*.txt'"
    command = ["launch/tpu_vm.sh", "--config=c.py", glob]
    lines = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z"] and "--worker=all" in lines
    remote = lines[-1].removeprefix("--command=")
    assert "MTP_HEARTBEAT_SECONDS=30" in remote and ". launch/xla_flags.sh tpu" in remote
    arguments = remote[remote.index("train.py") :].removeprefix("train.py")
    split = subprocess.run(["bash", "-c", f"printf '%s\\n'{arguments}"], capture_output=True, text=True, check=True)
    assert split.stdout.splitlines() == ["--config=c.py", glob]


def test_the_jobset_is_consistent():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load(pathlib.Path(ROOT / "launch" / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"]}
    assert rules == {"FailJob": [2], "Count": [1, 75, 76, 130]}
    sides = [int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"] * spec["completions"]
    assert sides[0] * sides[1] * sides[2] == chips
