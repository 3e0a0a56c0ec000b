import pytest
from pretended import PretendedSystem

from fleetune.device_runtime.rules.uplink import uplink_kind


@pytest.fixture
def system(tmp_path):
    return PretendedSystem(tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "entries", "fields", "expected"),
    [
        ("eth0", ["device"], {}, "wired"),
        ("end0", ["device"], {}, "wired"),
        ("wlan0", ["device", "phy80211"], {}, "wireless"),
        ("wlp2s0", ["device", "wireless"], {}, "wireless"),
        ("wl0", ["device"], {"uevent": "DEVTYPE=wlan"}, "wireless"),
        ("wwan0", ["device"], {"type": 65534}, "cellular"),
        ("enx0", ["device"], {"uevent": "DEVTYPE=wwan"}, "cellular"),
        ("rmnet_data0", [], {"type": 519}, "cellular"),
        ("ppp0", [], {"type": 512}, "cellular"),
        ("eth0", [], {}, "other"),
        ("tun0", [], {"type": 65534}, "other"),
        ("wg0", [], {"type": 65534, "uevent": "DEVTYPE=wireguard"}, "other"),
    ],
)
def test_kind_of_an_interface(system, name, entries, fields, expected):
    system.interface(name, *entries, **fields)
    system.uplink(name)
    assert uplink_kind(system.root) == (expected, "")


def test_a_bridge_a_bond_and_a_vlan_are_what_they_stand_on_the_dearest_if_on_several(system):
    system.interface("eth0", "device")
    system.interface("eth0.7", "lower_eth0", uevent="DEVTYPE=vlan")
    system.interface("wlan0", "device", "wireless")
    system.interface("br0", "lower_eth0.7", uevent="DEVTYPE=bridge")
    system.interface("bond0", "lower_eth0", "lower_wlan0", uevent="DEVTYPE=bond")
    for name, kind in {"eth0.7": "wired", "br0": "wired", "bond0": "wireless"}.items():
        system.uplink(name)
        assert uplink_kind(system.root) == (kind, "")


def test_interfaces_that_stand_on_each_other_end_somewhere(system):
    system.interface("a", "lower_b")
    system.interface("b", "lower_a")
    system.uplink("a")
    assert uplink_kind(system.root) == ("other", "")


def test_the_default_route_of_the_lowest_metric_that_is_up_counts(system):
    system.interface("eth0", "device")
    system.interface("wlan0", "device", "wireless")
    system.interface("wwan0", "device")
    system.routes(
        "wwan0 00000000 0201 10 00000000",
        "wwan0 00000000 0002 20 00000000",
        "wwan0 00000000 0003 700 00000000",
        "wlan0 00000000 0003 600 00000000",
        "eth0 0001A8C0 0001 100 00FFFFFF",
        "wwan0 00000000 0001 5 00000080",
    )
    assert uplink_kind(system.root) == ("wireless", "")


def test_no_default_route_is_no_network_and_ipv6_alone_is_one(system):
    system.interface("eth0", "device")
    system.routes("eth0 0001A8C0 0001 100 00FFFFFF")
    zero, unreachable = "0" * 32, "lo"
    line = f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 {unreachable}"
    system.write("proc/net/ipv6_route", line)
    assert uplink_kind(system.root) == ("none", "")
    gateway = "fe80" + "0" * 27 + "1"
    system.write(
        "proc/net/ipv6_route",
        f"{zero} 00 {zero} 00 {gateway} 00000400 00000001 00000000 00000003 eth0\n{line}",
    )
    assert uplink_kind(system.root) == ("wired", "")


def test_what_is_missing_or_malformed_is_unknown_or_no_route(system):
    assert uplink_kind(system.root) == (None, "there is no routing table")
    system.uplink("eth9")
    assert uplink_kind(system.root) == (None, "eth9 is not in /sys/class/net")
    system.write("proc/net/route", "Iface\neth0 00000000 0 zz 0 0 zz 00000000\nshort line")
    assert uplink_kind(system.root) == ("none", "")
