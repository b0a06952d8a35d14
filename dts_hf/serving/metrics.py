"""What a server counts, as Prometheus reads it (text exposition format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Metrics:
    """Numbers since the start; no word of any question.

    Attributes:
        requests: by status code.
        rows: answered.
        tokens: read for them.
        labels: states sent.
        bytes_sent: of answers.
    """

    requests: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    tokens: int = 0
    labels: int = 0
    bytes_sent: int = 0

    def text(self, waiting: int, busy: float) -> str:
        """All of them.

        Args:
            waiting: questions that are here, the one at work included.
            busy: seconds of work.
        """
        totals = {
            "rows_total": ("Rows answered.", self.rows),
            "tokens_total": ("Tokens read for them.", self.tokens),
            "labels_total": ("States sent, one for each label.", self.labels),
            "sent_bytes_total": ("Bytes of answers.", self.bytes_sent),
            "forward_seconds_total": ("Seconds that the model has worked.", round(busy, 6)),
        }
        lines = [*_head("requests_total", "counter", "Requests for states, by status code.")]
        lines += [f'dts_hf_teacher_requests_total{{status="{code}"}} {n}' for code, n in sorted(self.requests.items())]
        for name, (words, value) in totals.items():
            lines += [*_head(name, "counter", words), f"dts_hf_teacher_{name} {value}"]
        lines += [*_head("queue", "gauge", "Questions waiting or at work."), f"dts_hf_teacher_queue {waiting}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, words: str) -> list[str]:
    return [f"# HELP dts_hf_teacher_{name} {words}", f"# TYPE dts_hf_teacher_{name} {kind}"]
