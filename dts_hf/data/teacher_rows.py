"""Rows of text as their teacher reads them, tokenised beside the student's: other prompts, the same labels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

from dts_hf.data.row_encoder import EncodedRow, RowEncoder
from dts_hf.data.rows import Row
from dts_hf.data.teacher_context import with_teacher_prefix
from dts_hf.errors import UserError


class TeacherRows:
    """Gives encoded rows what their teacher reads.

    Args:
        encoder: of the student's rows. ``max_length`` holds for the teacher's as well; its prompt may be as long as leaves
            room for one token of an answer.
    """

    def __init__(self, encoder: RowEncoder) -> None:
        self.encoder = RowEncoder(
            encoder.tokenizer, encoder.cutter, encoder.max_length, encoder.max_length - 1, encoder.eos
        )

    def add(self, rows: Sequence[Row], encoded: Sequence[EncodedRow | None]) -> tuple[list[EncodedRow | None], int]:
        """``encoded`` with the teacher's rows; None where there is no room for the text and a label.

        Where the end of the teacher's row is cut at ``max_length``, the student's is cut behind the same label.

        Args:
            rows: the text; only where a column is named for what a teacher alone reads is anything done.
            encoded: the same as tokens.

        Returns:
            the rows, and how many are too long only because of that text.

        Raises:
            UserError: the text cannot stand before a row, or changes the tokens of its answers.
        """
        if not any(row.teacher_prefix is not None for row in rows):
            return list(encoded), 0
        places = [k for k, one in enumerate(encoded) if one is not None and rows[k].teacher_prefix]
        sides = dict(zip(places, self.encoder.encode([with_teacher_prefix(rows[k]) for k in places]), strict=True))
        found: list[EncodedRow | None] = []
        too_long = 0
        for k, one in enumerate(encoded):
            if one is None:
                found.append(None)
            elif k not in sides:
                found.append(one._replace(teacher_ids=one.ids, teacher_spans=one.spans))
            else:
                both = self._both(rows[k], one, sides[k])
                too_long += both is None or (both.cut and not one.cut)
                found.append(both)
        return found, too_long

    def _both(self, row: Row, one: EncodedRow, side: EncodedRow | None) -> EncodedRow | None:
        if side is None or side.prompt_cut:
            return None
        if len(one.spans) == len(side.spans) == 2:
            # One answer: the student's own tokens, whatever a tokenizer makes of the text around them
            ids = (side.ids[: side.spans[0]] + one.ids[one.spans[0] :])[: self.encoder.max_length]
            cut = side.spans[0] + len(one.ids) - one.spans[0] > len(ids)
            side = side._replace(ids=ids, spans=array("i", [side.spans[0], len(ids)]), cut=cut)
        ours, theirs = _learned(one), _learned(side)
        count = min(len(ours), len(theirs))
        if ours[:count] != theirs[:count] or (len(ours) != len(theirs) and not (one.cut or side.cut)):
            raise UserError(
                f"row '{row.id}': the text of data.teacher_prefix_column changes the tokens of its answers, so teacher and "
                "student would not learn the same ones. Use data.train_on: last_turn"
            )
        if not count:
            return None
        one, side = _up_to(one, count), _up_to(side, count)
        cut = one.cut or side.cut
        return one._replace(cut=cut, teacher_ids=side.ids, teacher_spans=side.spans)


def _learned(row: EncodedRow) -> list[int]:
    spans = zip(row.spans[::2], row.spans[1::2], strict=True)
    return list(chain.from_iterable(row.ids[start:stop] for start, stop in spans))


def _up_to(row: EncodedRow, count: int) -> EncodedRow:
    """``row`` cut behind its label number ``count``, where it has more."""
    if len(_learned(row)) <= count:
        return row
    left, spans = count, array("i")
    for start, stop in zip(row.spans[::2], row.spans[1::2], strict=True):
        taken = min(left, stop - start)
        left -= taken
        spans.extend((start, start + taken) if taken else ())
    return row._replace(ids=row.ids[: spans[-1]], spans=spans, cut=True)
