"""A device and its events, whose clock a test sets by hand."""

from __future__ import annotations

from lightning_superscale.timeline import DeviceWaits


class Device:
    """A stream whose clock is set by hand, and that is as far as it is said to be."""

    def __init__(self):
        self.now, self.has_run = 0.0, True

    def waits(self) -> DeviceWaits:
        return DeviceWaits(lambda: self, lambda: PlayedEvent(self))


class PlayedEvent:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self, stream):
        assert stream is self.device
        self.at = stream.now

    def query(self):
        return self.device.has_run

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)
