"""Why an MQTT server refuses: its reason codes, whether they pass by themselves, and what to do.

Source: MQTT 5, section 2.4; MQTT 3.1.1 has five of them, under other numbers, and no answer to a denied message.
"""

BAD_LOGIN, NOT_AUTHORIZED, TAKEN_OVER = 0x86, 0x87, 0x8E
UNSUPPORTED_VERSION, NOT_A_CLIENT_ID, PACKET_TOO_LARGE, QUOTA_EXCEEDED = 0x84, 0x85, 0x95, 0x97

_PASSING = frozenset(
    {0x80, 0x83, 0x88, 0x89, 0x8B, 0x8D, 0x91, 0x92, 0x93, 0x94, 0x96, QUOTA_EXCEEDED, 0x98, 0x9F, 0xA0}
)
_PASSING_AT_CONNECT = frozenset({0x88, 0x89, QUOTA_EXCEEDED, 0x9F})
_ADVICE = {
    NOT_A_CLIENT_ID: "give another --id; the server may hold this one back for a client that is connected",
    BAD_LOGIN: "check the user name and the password",
    0x88: "the server is not available now",
    0x89: "the server is busy",
    0x8A: "the server's operator has banned this user, client id or address",
    0x8C: "the server wants another kind of login than a password or certificate",
    0x90: "the server does not allow topics of this form",
    PACKET_TOO_LARGE: "raise the server's limit of a packet to 128 kB or more",
    0x96: "the server's limit of messages a second is reached",
    QUOTA_EXCEEDED: "the server's quota for this client is used up; raise it, or wait",
    0x98: "the server's operator has ended the connection",
    0x9A: "fleetune needs retained messages; allow them at the server",
    0x9B: "fleetune needs QoS 1; allow it at the server",
    0x9C: "the server sends its clients to another one; ask its operator which",
    0x9D: "the server has moved; ask its operator where to",
    0x9F: "the server's limit of connections a second is reached",
    0xA2: "fleetune's aggregator needs subscriptions with a wildcard; allow them at the server",
}


def passes(code: int) -> bool:
    """Whether what was refused to a client that is connected may be granted later."""
    return code in _PASSING


def passes_at_connect(code: int) -> bool:
    """Whether a client that was refused at its first connection may be let in soon."""
    return code in _PASSING_AT_CONNECT


def explain(code: int, name: str, *, denied: str = "") -> str:
    """Name the reason and what to do; ``denied`` is what to do when a right is missing."""
    advice = denied if code == NOT_AUTHORIZED else _ADVICE.get(code, "")
    return f"{name}; {advice}" if advice else name
