"""What ``cryptography`` raises for certificates and requests that strangers wrote; several are no ValueError."""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

MALFORMED = (
    ValueError,
    TypeError,
    AttributeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""Version, extensions and kinds of keys are read when they are asked for: each access may raise."""
