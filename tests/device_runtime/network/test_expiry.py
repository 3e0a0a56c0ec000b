"""The end of a certificate, read without a library, is what a library reads; nothing that is read so raises anything else."""

import random
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fleetune.device_runtime.network.expiry import end_of, expiry_warning

KEYS = [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)]


def made(ends, key=KEYS[0], *, serial=1, name="x"):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    )
    builder = builder.serial_number(serial).not_valid_before(datetime(1960, 1, 1)).not_valid_after(ends)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("key", KEYS, ids=["ec", "rsa"])
@pytest.mark.parametrize("year", [1961, 1999, 2026, 2049, 2050, 2068, 2069, 9999])
def test_it_reads_what_cryptography_reads(year, key):
    for serial, name in ((1, "x"), (2**158 + 7, "y" * 64)):
        pem = made(datetime(year, 12, 31, 23, 59, 59, tzinfo=timezone.utc), key, serial=serial, name=name)
        assert end_of(pem) == x509.load_pem_x509_certificate(pem).not_valid_after_utc
        assert (
            end_of(
                b"-----BEGIN EC PARAMETERS-----\nAA==\n-----END EC PARAMETERS-----\n"
                + pem
                + made(datetime(2030, 1, 1), key)
            ).year
            == year
        )


def test_what_is_damaged_is_a_value_error_and_no_warning(tmp_path):
    pem, draws = made(datetime(2030, 1, 1)), random.Random(3)
    path = tmp_path / "x.crt"
    for _ in range(3000):
        damaged = bytearray(pem)
        for _ in range(draws.randrange(1, 4)):
            damaged[draws.randrange(28, len(pem) - 27)] = draws.choice(b"ABCDwxyz0189+/=\n-")
        try:
            end_of(bytes(damaged))
        except ValueError:
            path.write_bytes(damaged)
            assert expiry_warning(path, datetime.now(timezone.utc)) == ""
    assert expiry_warning(tmp_path / "nowhere", datetime.now(timezone.utc)) == ""


def test_the_warning_begins_thirty_days_before(tmp_path):
    path, ends = tmp_path / "x.crt", datetime(2030, 1, 31, tzinfo=timezone.utc)
    path.write_bytes(made(ends))
    day = timedelta(days=1)
    assert expiry_warning(path, ends - 31 * day) == ""
    assert expiry_warning(path, ends - 30 * day).endswith("ends on 2030-01-31, in 30 days; renew it")
    assert expiry_warning(path, ends).endswith(
        "ended on 2030-01-31; renew it, unless this machine's clock is wrong"
    )
