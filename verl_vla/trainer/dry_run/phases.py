"""What a dry run measures, phase by phase, and how it is passed between processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(slots=True, kw_only=True)
class Phase:
    """Peaks of one part of a training run, bytes."""

    name: str
    allocated: int
    """Largest number of bytes in tensors on the device."""
    reserved: int
    """Bytes that the allocator held of the device at most, those it keeps for later included."""
    fragmented: int
    """Bytes it held and could not use when it asked the device for more; 0 where it never did."""
    free: int
    """Smallest number of bytes of the device that the allocator did not hold."""
    host: int
    """Largest number of bytes in tensors of the host, without those of the data."""
    flops: int
    """FLOPs of the phase; a multiplication and an addition are two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Phases of a dry run, in order; the last one may be the one that did not fit."""

    phases: Sequence[Phase]
    out_of_memory: str | None = None
    """What the allocator said where the device was full; None where everything fitted."""

    @property
    def fits(self) -> bool:
        """True where every phase fitted."""
        return self.out_of_memory is None

    def worst(self, kind: str) -> Phase:
        """Return the largest of the phases whose name begins with ``kind``."""
        return max(
            (phase for phase in self.phases if phase.name.split(",")[0] == kind),
            key=lambda phase: phase.allocated,
        )

    def write(self, file: Path) -> None:
        """Write it to a file."""
        file.write_text(
            json.dumps({"phases": [*map(asdict, self.phases)], "out_of_memory": self.out_of_memory})
        )

    @classmethod
    def read(cls, file: Path) -> Replay:
        """Read what `write` wrote."""
        values = json.loads(file.read_text())
        return cls(
            phases=[Phase(**phase) for phase in values["phases"]],
            out_of_memory=values["out_of_memory"],
        )
