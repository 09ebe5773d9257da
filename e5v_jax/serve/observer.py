"""What the engine tells of its work, for whoever measures it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchReport:
    """What one device batch was."""

    items: int
    tokens: int
    positions: int  # tokens and padding
    queue_seconds: list[float]  # of each item, from the call until it went to the device
    device_seconds: float


class Observer:
    """This hears what the engine does, from any thread; a subclass keeps what it wants."""

    def tokenised(self, seconds: float) -> None:
        """Of the inputs of one call."""

    def decoded(self, seconds: float) -> None:
        """Of one image: reading its pixels and resizing it."""

    def ran(self, batch: BatchReport) -> None:
        """A batch is computed."""
