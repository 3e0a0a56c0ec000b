"""When a certificate ends, read from its bytes: a word in time needs no library of certificates on a device.

What it reads decides nothing: whether a certificate holds is the server's to say.
Source: RFC 5280, sections 4.1 and 4.1.2.5; X.690 for the encoding.
"""

import base64
import binascii
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

WARN_DAYS = 30

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
_VERSION, _UTC_TIME, _GENERALIZED_TIME = 0xA0, 0x17, 0x18
_BEFORE_VALIDITY = 3
"""Fields after the version: serial number, signature algorithm, issuer."""


def expiry_warning(path: Path, now: datetime) -> str:
    """Say that the first certificate of a PEM file has ended, or will within 30 days; empty if not, or if it cannot be read."""
    try:
        ends = end_of(path.read_bytes())
    except (OSError, ValueError):
        return ""
    if ends <= now:
        return f"{path}: ended on {ends:%Y-%m-%d}; renew it, unless this machine's clock is wrong"
    if ends - now <= timedelta(days=WARN_DAYS):
        return f"{path}: ends on {ends:%Y-%m-%d}, in {(ends - now).days} days; renew it"
    return ""


def end_of(pem: bytes) -> datetime:
    """Return the end of the first certificate's validity, UTC; ValueError if there is none, or it is damaged."""
    found = _PEM.search(pem)
    if not found:
        raise ValueError("no certificate")
    try:
        certificate, _ = _inside(base64.b64decode(b"".join(found[1].split()), validate=True))
        fields, _ = _inside(certificate)
        if fields[0] == _VERSION:
            _, fields = _inside(fields)
        for _ in range(_BEFORE_VALIDITY):
            _, fields = _inside(fields)
        validity, _ = _inside(fields)
        _, end = _inside(validity)
        return _time(end[0], _inside(end)[0])
    except (binascii.Error, IndexError) as exc:
        raise ValueError("a damaged certificate") from exc


def _inside(der: bytes) -> tuple[bytes, bytes]:
    """Split DER after its first element; return what that holds, and the rest."""
    length, begin = der[1], 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(der[2:begin], "big")
    if begin + length > len(der):
        raise ValueError("cut off")
    return der[begin : begin + length], der[begin + length :]


def _time(tag: int, text: bytes) -> datetime:
    form = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}.get(tag)
    if form is None:
        raise ValueError("not a time")
    ends = datetime.strptime(text.decode("ascii"), form).replace(tzinfo=timezone.utc)
    is_last_century = tag == _UTC_TIME and ends.year >= 2050  # strptime's own two-digit years turn at 1969
    return ends.replace(year=ends.year - 100) if is_last_century else ends
