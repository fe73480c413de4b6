"""Several monitors as one."""

from __future__ import annotations


class Group:
    """Monitors with unique names; `metrics()` is their lines, `as_dict()` their numbers by name."""

    def __init__(self, *monitors):
        self.monitors: list = []
        for monitor in monitors:
            self.add(monitor)

    def add(self, monitor) -> None:
        """Take up a monitor: it has a `name`, `reset()`, `metrics()` and `as_dict()`."""
        if any(monitor.name == other.name for other in self.monitors):
            raise ValueError(
                f"there is a monitor called {monitor.name!r} already; give each its own name"
            )
        self.monitors.append(monitor)

    def reset(self) -> None:
        """Start counting anew."""
        for monitor in self.monitors:
            monitor.reset()

    def metrics(self) -> str:
        """One line per monitor."""
        return "\n".join(monitor.metrics() for monitor in self.monitors)

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {monitor.name: monitor.as_dict() for monitor in self.monitors}
