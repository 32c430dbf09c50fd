"""Counters by document: bounded in number, with labels that any exporter can write."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ragkv.connectors.vllm.documents import LONGEST_LABEL, OTHER, DocumentStats, clean
from ragkv.kvstore.metrics import DOCUMENT_HITS, DOCUMENT_SAVED_TOKENS, SEPARATOR, Metrics, split


def counted(metrics):
    """Hits and saved tokens by label."""
    found = {}
    for key, value in metrics.drain().get("counters", {}).items():
        name, (label,) = split(key)
        found.setdefault(label, {})[name] = value
    return {label: (each[DOCUMENT_HITS], each[DOCUMENT_SAVED_TOKENS]) for label, each in found.items()}


def test_the_first_documents_have_labels_and_keep_them():
    metrics = Metrics()
    stats = DocumentStats(metrics, limit=2)
    for document, tokens in [("a", 10), ("b", 5), ("c", 3), ("a", 7), ("d", 1), ("b", 2)]:
        stats.note(document, tokens)
    assert counted(metrics) == {"a": (2, 17), "b": (2, 7), OTHER: (2, 4)}
    stats.note("b", 1)
    assert counted(metrics) == {"b": (1, 1)}


def test_what_saved_nothing_takes_no_place():
    metrics = Metrics()
    stats = DocumentStats(metrics, limit=1)
    for document, tokens in [("a", 0), ("b", -1), ("", 5), ("\x00", 5), ("c", 3)]:
        stats.note(document, tokens)
    assert counted(metrics) == {"c": (1, 3)}


def test_without_a_place_all_are_others():
    metrics = Metrics()
    DocumentStats(metrics, limit=0).note("a", 4)
    assert counted(metrics) == {OTHER: (1, 4)}


@pytest.mark.parametrize(
    ("document", "label"),
    [
        ("10-K 2023", "10-K 2023"),
        (f"a{SEPARATOR}b", "a b"),
        ("two\nlines\t", "two lines"),
        ("half \ud800 a character", "half a character"),
        ("Zürich, 東京", "Zürich, 東京"),
        ("x" * 300, "x" * LONGEST_LABEL),
        ("x" * (LONGEST_LABEL - 1) + " y", "x" * (LONGEST_LABEL - 1)),
        ("\r\n", ""),
    ],
)
def test_ids_are_cleaned(document, label):
    assert clean(document) == label


@given(st.text(st.characters(), max_size=300))
def test_any_id_makes_a_label(document):
    label = clean(document)
    assert len(label) <= LONGEST_LABEL and label.isprintable() and SEPARATOR not in label
    label.encode()
    assert clean(label) == label
