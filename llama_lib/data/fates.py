"""What becomes of every tokenised document: trained on, held out, or left out and why.

Invariant: a document is left out for one reason, the first that holds; memory does not grow with
the documents, of which one byte each is kept in a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.dedup import Duplicates, words
from llama_lib.data.draw import Draw
from llama_lib.data.tokenised import DOCUMENT, Stored, Tokenised, documents_path

HASHES = 1 << 64  # the numbers that decide what is held out are drawn from 0..HASHES-1

# Reasons in the order in which they are looked at; 0 is a document that stays.
REASONS = ("too_short", "too_long", "in_eval_data", "duplicates", "not_drawn")
_STAYS = 0
_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Rules:
    """Which documents stay. `limits` are documents per entry of -d, drawn by `seed`.

    `excluded` are the hashes of texts that are held out by hand, sorted. `cut`: a document whose
    hash as a number is below it is held out.
    """

    min_length: int | None = None
    max_length: int | None = None
    excluded: npt.NDArray[np.bytes_] | None = None
    dedup: bool = False
    limits: Mapping[int, int] | None = None
    seed: int = 0
    cut: int = 0


class Fates:
    """One byte per document, in a mapped file, by the documents' order in the sources."""

    def __init__(self, sources: Sequence[Tokenised], work: Path, rules: Rules) -> None:
        self._work = work
        self._rules = rules
        self._sources = sources
        self._first: dict[int, int] = {}
        total = 0
        for source in sources:
            for part in source.parts:
                self._first[part.number] = total
                total += part.documents
        self.num_documents = total
        path = work / f"fates-{min(self._first, default=0):06d}"
        with path.open("wb") as file:
            # A full disk is an error here; for a page of a sparse file it would end the process.
            os.posix_fallocate(file.fileno(), 0, max(total, 1))
        self._codes = np.memmap(path, np.uint8, mode="r+")
        # Before what is drawn: a document that is left out anyway takes no place of another.
        self._filter()
        if rules.dedup:
            self._find_duplicates()
        if rules.limits:
            self._draw(rules.limits)
        self.num_kept = 0
        self.cut = self._mended_cut()

    def chunks(self, part: Stored) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]]:
        """(about documents, their codes) of a part, some at a time; codes can be written to."""
        path = documents_path(self._work, part.number)
        for start in range(0, part.documents, _CHUNK):
            count = min(_CHUNK, part.documents - start)
            about = np.fromfile(path, DOCUMENT, count, offset=start * DOCUMENT.itemsize)
            first = self._first[part.number] + start
            yield about, self._codes[first : first + count]

    def sides(
        self, part: Stored
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
        """(about documents, which are trained on, which are held out) of a part."""
        for about, codes in self.chunks(part):
            stays = codes == _STAYS
            aside = _below(about["hash"], self.cut)
            yield about, stays & ~aside, stays & aside

    def trained_tokens(self, source: Tokenised) -> int:
        """Tokens of a source that are left for training."""
        return sum(
            int(about["length"][trained].sum(dtype=np.int64))
            for part in source.parts
            for about, trained, _ in self.sides(part)
        )

    def left_out(self, source: Tokenised) -> dict[str, int]:
        """Documents of a source by the reason they are left out for."""
        counts = np.zeros(len(REASONS) + 1, np.int64)
        for part in source.parts:
            for _, codes in self.chunks(part):
                counts += np.bincount(codes, minlength=len(counts))
        return {reason: int(counts[code]) for reason, code in _CODES.items()}

    def _filter(self) -> None:
        rules = self._rules
        for source in self._sources:
            for part in source.parts:
                for about, codes in self.chunks(part):
                    if rules.excluded is not None and len(rules.excluded):
                        codes[_contained(about["hash"], rules.excluded)] = _CODES["in_eval_data"]
                    if part.is_rows:
                        continue  # rows are stored as they are
                    if rules.max_length is not None:
                        codes[about["length"] > rules.max_length] = _CODES["too_long"]
                    if rules.min_length is not None:
                        codes[about["length"] < rules.min_length] = _CODES["too_short"]

    def _find_duplicates(self) -> None:
        with Duplicates(self._work / "hashes", self.num_documents) as duplicates:
            for source in self._sources:
                for part in source.parts:
                    first = self._first[part.number]
                    for about, codes in self.chunks(part):
                        stays = np.flatnonzero(codes == _STAYS)
                        duplicates.add(about["hash"][stays], first + stays)
                        first += len(codes)
            for numbers in duplicates.numbers():
                self._codes[numbers] = _CODES["duplicates"]

    def _draw(self, limits: Mapping[int, int]) -> None:
        for entry, limit in limits.items():
            parts = [p for s in self._sources if s.source.entry == entry for p in s.parts]
            total = sum(
                int(np.count_nonzero(codes == _STAYS))
                for part in parts
                for _, codes in self.chunks(part)
            )
            if not total:
                continue
            draw = Draw.of(limit, total, self._rules.seed)
            before = 0
            for part in parts:
                for _, codes in self.chunks(part):
                    stays = np.flatnonzero(codes == _STAYS)
                    chosen = draw.chosen(np.arange(before, before + len(stays)))
                    codes[stays[~chosen]] = _CODES["not_drawn"]
                    before += len(stays)

    def _mended_cut(self) -> int:
        """Another cut if all documents fall on one side: one distinct text at least goes to each.

        Counts the documents that stay on the way.
        """
        cut = self._rules.cut
        lowest, highest, aside = HASHES, -1, 0
        for source in self._sources:
            for part in source.parts:
                for about, codes in self.chunks(part):
                    values, _ = words(about["hash"][codes == _STAYS])
                    if len(values):
                        lowest = min(lowest, int(values.min()))
                        highest = max(highest, int(values.max()))
                        aside += int(np.count_nonzero(values < cut)) if cut else 0
                        self.num_kept += len(values)
        if not cut or not self.num_kept or 0 < aside < self.num_kept:
            return cut
        if lowest == highest:
            return 0
        return highest if aside else lowest + 1


def _below(hashes: npt.NDArray[np.bytes_], cut: int) -> npt.NDArray[np.bool_]:
    if not cut:
        return np.zeros(len(hashes), bool)
    return words(hashes)[0] <= np.uint64(cut - 1)


def _contained(
    hashes: npt.NDArray[np.bytes_], ordered: npt.NDArray[np.bytes_]
) -> npt.NDArray[np.bool_]:
    places = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    return ordered[places] == hashes
