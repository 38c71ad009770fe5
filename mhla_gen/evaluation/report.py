"""Results as people and programs read them: a table and metrics.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_gen.evaluation.intervals import Interval
from mhla_gen.files import write_json


@dataclass(frozen=True)
class Result:
    """One number, and all that is needed to compare it."""

    metric: str
    value: float
    protocol: str
    interval: Interval | None = None
    spread: float | None = None
    """Standard deviation over splits (IS) or subsets (KID)."""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for metrics.json; what a metric does not have is left out."""
        found: dict[str, Any] = {"value": self.value, "protocol": self.protocol}
        if self.interval:
            found["interval_95"] = [self.interval.low, self.interval.high]
            found["interval_method"] = self.interval.method
        if self.spread is not None:
            found["std"] = self.spread
        if self.note:
            found["note"] = self.note
        return found


def write_report(path: Path, results: list[Result], context: dict[str, Any]) -> None:
    """Write metrics.json: `context`, and each metric by name. Whole or not at all."""
    content = {**context, "metrics": {result.metric: result.to_dict() for result in results}}
    write_json(path, content)


def format_table(results: list[Result]) -> str:
    """The results as lines of text: value, 95 % interval, protocol; notes below."""
    rows = [("metric", "value", "95 % interval", "protocol")]
    for result in results:
        interval = result.interval
        reach = f"{interval.low:.4f} … {interval.high:.4f}" if interval else "–"
        rows.append((result.metric, f"{result.value:.4f}", reach, result.protocol))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}"
        for row in rows
    ]
    notes = [f"{result.metric}: {result.note}" for result in results if result.note]
    return "\n".join(lines + notes)
