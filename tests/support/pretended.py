"""A pretended system: a folder with the files of /sys and /proc that the sensors read."""

import shutil
from pathlib import Path


class PretendedSystem:
    """Files appear, change and vanish as the test says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def remove(self, path: str) -> None:
        found = self.root / path
        shutil.rmtree(found) if found.is_dir() else found.unlink()

    def zone(self, degrees: float, *, index: int = 0, kind: str = "cpu-thermal") -> None:
        self.raw_zone(round(degrees * 1000), index=index, kind=kind)

    def raw_zone(self, text: object, *, index: int = 0, kind: str = "cpu-thermal") -> None:
        self.write(f"sys/class/thermal/thermal_zone{index}/type", kind)
        self.write(f"sys/class/thermal/thermal_zone{index}/temp", text)

    def supply(self, name: str, **files: object) -> None:
        for file, text in files.items():
            self.write(f"sys/class/power_supply/{name}/{file}", text)

    def load_average(self, one_minute: object) -> None:
        self.write("proc/loadavg", f"{one_minute} 0.00 0.00 1/100 4242")

    def cpu_time(self, *, busy: int, idle: int, own: int, cores: int = 2) -> None:
        """Clock ticks since the start; the program's name has a bracket and a space, as names may."""
        lines = [
            f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0",
            *(f"cpu{i} 0 0 0 0 0 0 0 0 0 0" for i in range(cores)),
        ]
        self.write("proc/stat", "\n".join([*lines, "intr 1", "ctxt 2"]))
        fields = ["R", *["0"] * 10, str(own), "0", *["0"] * 30]
        self.write("proc/self/stat", "42 (a (b) c) " + " ".join(fields))

    def routes(self, *lines: str) -> None:
        """Lines of /proc/net/route: interface, destination, flags, metric, mask."""
        rows = ["Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"]
        for line in lines:
            name, destination, flags, metric, mask = line.split()
            rows.append(
                "\t".join([name, destination, "0101A8C0", flags, "0", "0", metric, mask, "0", "0", "0"])
            )
        self.write("proc/net/route", "\n".join(rows))

    def uplink(self, name: str) -> None:
        self.routes(f"{name} 00000000 0003 100 00000000", f"{name} 0001A8C0 0001 100 00FFFFFF")

    def interface(self, name: str, *entries: str, type: int = 1, uevent: str = "") -> None:
        folder = f"sys/class/net/{name}"
        self.write(f"{folder}/type", type)
        self.write(f"{folder}/uevent", f"{uevent}\nINTERFACE={name}")
        for entry in entries:
            (self.root / folder / entry).mkdir()
