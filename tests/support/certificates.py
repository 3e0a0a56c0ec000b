"""An authority of tests, and certificates that it signs, made by openssl."""

import subprocess
from pathlib import Path
from typing import NamedTuple

_EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]


class Pair(NamedTuple):
    cert: str
    key: str


class Authority:
    """Lies in ``folder``; everything in it can be read by everybody."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder, self.name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self.cert = str(folder / f"{name}.pem")
        made = ["-x509", "-days", "2", "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign"]
        self._openssl("req", *_EC, "-nodes", *made, "-keyout", f"{name}.key", "-out", f"{name}.pem")

    def sign(self, name: str, *, alternatives: str = "", days: int = 2, password: str = "") -> Pair:
        """Make ``name.pem`` and ``name.key``; ``alternatives`` as in subjectAltName, ``days`` may be negative."""
        locked = ["-passout", f"pass:{password}"] if password else ["-nodes"]
        names = ["-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr"]
        self._openssl("req", *_EC, *locked, *names)
        (self.folder / "extensions").write_text(
            f"subjectAltName={alternatives or f'DNS:{name}'}\nauthorityKeyIdentifier=keyid\n"
        )
        by = ["-CA", self.cert, "-CAkey", f"{self.name}.key", "-CAcreateserial", "-extfile", "extensions"]
        dates = ["-days", str(days)]
        self._openssl("x509", "-req", "-in", f"{name}.csr", *by, *dates, "-out", f"{name}.pem")
        (self.folder / f"{name}.key").chmod(0o644)
        return Pair(*(str(self.folder / f"{name}.{end}") for end in ("pem", "key")))

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)
