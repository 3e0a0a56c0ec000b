"""What a look at a device finds: one line each."""

import msgspec

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(msgspec.Struct, frozen=True):
    """Something that was looked at."""

    what: str
    level: str
    """``ok``, ``warn`` (it works, perhaps not as expected) or ``fail`` (the device would not work)."""
    said: str
    remedy: str = ""
    """What to do; empty if it is well."""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.what}: {self.said}" + (f" -> {self.remedy}" if self.remedy else "")
