"""How often each document was reused and what that saved, by the ids that requests' hints give."""

from ragkv.kvstore.metrics import DOCUMENT_HITS, DOCUMENT_SAVED_TOKENS, Metrics

OTHER = "(other)"
LONGEST_LABEL = 100  # characters


class DocumentStats:
    """Counts by document, for at most `limit` of them: the first that are reused; the others are one, OTHER."""

    def __init__(self, metrics: Metrics, limit: int) -> None:
        self._metrics, self._limit = metrics, limit
        self._labels: set[str] = set()

    def note(self, document: str, hit_tokens: int) -> None:
        """A request did not compute `hit_tokens` tokens of a document; call it once a document and request.

        Nothing is counted for no tokens, and for a document without a name.
        """
        label = clean(document)
        if hit_tokens <= 0 or not label:
            return
        if label not in self._labels:
            if len(self._labels) < self._limit:
                self._labels.add(label)
            else:
                label = OTHER
        self._metrics.count(DOCUMENT_HITS, document=label)
        self._metrics.count(DOCUMENT_SAVED_TOKENS, hit_tokens, document=label)


def clean(document: str) -> str:
    """An id as a label: printable (so without the recorder's separator, or halves of characters), and short."""
    printable = (character if character.isprintable() else " " for character in document[: 2 * LONGEST_LABEL])
    return " ".join("".join(printable).split())[:LONGEST_LABEL].rstrip()
