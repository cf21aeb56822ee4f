"""A PATH on which gcloud, srun, git and sleep only write down how they were called, and answer by a plan."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TOOLS = ("bash", "cat", "cut", "date", "dirname", "env", "flock", "grep", "mkdir", "rm", "sed", "seq", "sh",
         "sort", "tr")  # fmt: skip
FAKES = ("gcloud", "git", "kubectl", "python", "scontrol", "srun", "sleep")
FAKE = """#!{python} -ES
import json, os, pathlib, sys
home = pathlib.Path(__file__).resolve().parent.parent
command = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(home / "log", "a") as file:
    file.write(json.dumps(command) + "\\n")
plan = json.loads((home / "plan").read_text())
for key, answers in plan.items():
    if key in " ".join(command):
        code, text = answers.pop(0) if len(answers) > 1 else answers[0]
        (home / "plan").write_text(json.dumps(plan))
        print(text, file=sys.stderr if code else sys.stdout)
        sys.exit(code)
"""


class Cloud:
    """Folder `root` with the fakes; the machine's own gcloud is out of reach.

    `plan` maps a part of a command line to its answers [code, text], the last of which repeats.
    """

    def __init__(self, root: Path, plan: dict | None = None):
        self.root, bin_folder = root, root / "bin"
        bin_folder.mkdir(parents=True)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (bin_folder / tool).symlink_to(found)
        for name in FAKES:
            (bin_folder / name).write_text(FAKE.format(python=sys.executable))
            (bin_folder / name).chmod(0o755)
        (root / "home").mkdir()
        (root / "tmp").mkdir()
        (root / "plan").write_text(json.dumps(plan or {}))
        self.env = {"PATH": str(bin_folder), "HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        command = [str(self.root / "bin" / "bash"), str(LAUNCH / script), *args]
        return subprocess.run(command, capture_output=True, text=True, env=self.env | env, timeout=60)

    def log(self, *without: str) -> list[list[str]]:
        """The commands so far, but those whose name is in `without`."""
        path = self.root / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [command for command in map(json.loads, lines) if command[0] not in without]

    def printed(self, script: str, *args: str, **env: str) -> list[list[str]]:
        """The commands that the dry run prints, taken apart by a shell."""
        result = self.run(script, "--dry-run", *args, **env)
        assert result.returncode == 0 and not result.stderr, result.stderr
        return [self.split(line) for line in result.stdout.splitlines()]

    def split(self, line: str) -> list[str]:
        command = ["bash", "-c", 'eval "set -- $1"; printf "%s\\0" "$@"', "-", line]
        out = subprocess.run(command, capture_output=True, text=True, env=self.env, check=True).stdout
        return out.split("\0")[:-1]

    def files(self) -> list[str]:
        """What lies in the home and the folder for temporary files."""
        return sorted(os.listdir(self.root / "home")) + sorted(os.listdir(self.root / "tmp"))


def remote_command(command: list[str]) -> str:
    (found,) = [part for part in command if part.startswith("--command=")]
    return found.removeprefix("--command=")
