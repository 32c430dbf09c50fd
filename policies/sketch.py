"""How often keys were seen of late, in some bytes a key, with no list of them."""

from array import array

ROWS = 4
HALVES = bytes(count >> 1 for count in range(256))


class FrequencySketch:
    """A count-min sketch (Cormode, Muthukrishnan 2005) with conservative update, counts of at most 15, and aging
    by halving (TinyLFU: Einziger, Friedman, Manes, ACM TOS 2017).

    `width`: counters a row, rounded up to a power of two. All counts are halved after `sample` increments for each
    counter of a row: the more, the more keys share one.
    """

    MOST = 15
    __slots__ = ("_additions", "_mask", "_rows", "_sample")

    def __init__(self, width: int = 64, sample: float = 2.5) -> None:
        self._mask = (1 << max(width - 1, 1).bit_length()) - 1
        self._rows = array("B", bytes(ROWS * (self._mask + 1)))
        self._additions = 0
        self._sample = sample

    @property
    def width(self) -> int:
        return self._mask + 1

    def add(self, bits: int) -> int:
        """Count one more of the key with that mark; its estimate, at most `MOST`."""
        rows, places = self._rows, self._places(bits)
        count = min([rows[at] for at in places])
        if count == self.MOST:
            return count
        for at in places:
            if rows[at] == count:
                rows[at] = count + 1
        self._additions += 1
        if self._additions >= self._sample * (self._mask + 1):
            self._halve()
        return count + 1

    def estimate(self, bits: int) -> int:
        """Never below the true count since the last halving, where that is at most `MOST`."""
        rows = self._rows
        return min([rows[at] for at in self._places(bits)])

    def widen(self, width: int) -> None:
        """Grow to at least `width` counters a row; estimates stay."""
        while self.width < width:
            rows, step = self._rows, self.width
            self._rows = array("B")
            for start in range(0, ROWS * step, step):
                self._rows.extend(rows[start : start + step] * 2)
            self._mask = 2 * step - 1

    def _places(self, bits: int) -> tuple[int, int, int, int]:
        mask = self._mask
        step = mask + 1
        return (
            bits & mask,
            step + (bits >> 16 & mask),
            2 * step + (bits >> 32 & mask),
            3 * step + ((bits >> 48 ^ bits << 7) & mask),
        )

    def _halve(self) -> None:
        self._rows = array("B", self._rows.tobytes().translate(HALVES))
        self._additions //= 2
