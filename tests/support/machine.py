"""A pretended machine for documents: a shell with its own /etc, /opt, /var/lib and /tmp, called ``server`` and ``pi``.

It needs root, and a kernel that gives namespaces. What a container does not have is played: ``sudo``, ``apt``, ``ssh`` and
``rsync`` to this same machine, and of systemd what ``enable --now`` and ``journalctl`` do. Nothing of it is left when the
shell ends.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import children
import pytest

_PLAYED = {
    "sudo": 'PATH=/mnt/played:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin exec "$@"',
    "apt": "exit 0",
    "ssh": 'shift; exec sh -c "$*"',
    "rsync": 'exec cp "${@#pi:}"',
    "journalctl": "cat /var/lib/journal",
    "systemctl": f'exec {sys.executable} {Path(__file__).with_name("unit.py")} "$@"',
}
_HERE = "/mnt"
"""Where the machine's own folder is, inside."""
_NAMES = "127.0.0.1 server pi"


class Machine:
    """A folder to work in, and a shell that runs there; ``output`` is what the last script said."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() or not shutil.which("unshare"):
            pytest.skip("needs root, and unshare of util-linux")
        self._all = folder
        self.folder = folder / "work"
        for name in ("work", "played", "home", "tmp", "etc", "opt", "lib"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        for name, text in _PLAYED.items():
            (folder / "played" / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / "played" / name).chmod(0o755)
        self.output = ""

    def run(self, script: str, *, timeout_s: float = 400) -> None:
        """Run a shell script; the first command that fails ends it, and fails the test with what was said."""
        whole = f"set -e\n{_MOUNTS.format(folder=self._all)}\ncd {_HERE}/work\nset -euo pipefail\n{script}\n"
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            whole,
        ]
        process = children.start(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment()
        )
        try:
            self.output, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert process.returncode == 0, f"exit code {process.returncode}\n{self.output[-6000:]}"

    def make_environment(self) -> str:
        """A script that makes an environment with this one's libraries, first on the path: fleetune alone is to be installed."""
        site = f"{_HERE}/env/lib/python{sysconfig.get_python_version()}/site-packages/these.pth"
        return f"{sys.executable} -m venv {_HERE}/env\necho {sysconfig.get_path('purelib')} > {site}\n"


_MOUNTS = f"""
mount --bind {{folder}} {_HERE}
cp -a /etc/. {_HERE}/etc
mount --bind {_HERE}/etc /etc
echo "{_NAMES}" >> /etc/hosts
for own in opt lib; do
    [ $own = opt ] && there=/opt || there=/var/lib
    for path in $there/*; do
        [ -d "$path" ] || continue
        mkdir "{_HERE}/$own/${{{{path##*/}}}}"
        mount --rbind "$path" "{_HERE}/$own/${{{{path##*/}}}}"
    done
    mount --rbind {_HERE}/$own $there
done
mount --bind {_HERE}/tmp /tmp
chmod 1777 /tmp
"""


def _environment() -> dict[str, str]:
    cache = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=False
    )
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "LANG", "HTTP", "http"))
    }
    configuration = Path.home() / ".config" / "pip" / "pip.conf"
    own = {"PIP_CONFIG_FILE": str(configuration)} if configuration.is_file() else {}
    path = f"{_HERE}/env/bin:{_HERE}/played:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    calm = {"PATH": path, "HOME": f"{_HERE}/home", "HF_HUB_OFFLINE": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    return {**kept, **own, **calm, "PIP_CACHE_DIR": cache.stdout.strip()}
