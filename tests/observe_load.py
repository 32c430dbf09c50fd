"""Requests that make a server with all tiers and fusion do everything that the dashboard shows.

The server needs a small memory tier (that the documents below do not fit into, all at once), a disk tier, a small
cache of vLLM's own, and to fuse where it is asked to. A device tier and Redis are welcome.
"""

from ragkv import rag
from ragkv.benchmarks.tenk import generate_filing
from ragkv.errors import RagKVError

DOCUMENTS = 8
CHARACTERS = 2400  # of each document: about 600 tokens
SYSTEM = "Answer from the excerpts, in a few words."
QUESTIONS = ("What were net sales?", "Who runs the company?", "Name one risk.")


def drive(url: str) -> None:
    """Play it all. RagKVError where the server refuses what it should not."""
    server = rag.Server(url)
    server.model = server.models()[0]["id"]
    documents = [(f"filing {n}", generate_filing(n, 500).text[:CHARACTERS]) for n in range(DOCUMENTS)]
    for _ in range(2):  # the second time from memory or disk: vLLM's own cache is too small
        for document in documents:
            _ask(server, [document], QUESTIONS[0], fuse=False)
    for question in QUESTIONS:  # hot: copied to the device tier
        _ask(server, documents[-1:], question, fuse=False)
    for passages in (documents[-2:], documents[-3:-1]):  # moved: fused
        _ask(server, passages[::-1], QUESTIONS[1], fuse=True)
    _converse(server, documents[0][1])
    _misbehave(server)


def _ask(server: rag.Server, passages: list[tuple[str, str]], question: str, *, fuse: bool) -> None:
    asked = rag.prompt(server, SYSTEM, passages, f"Question: {question}\nAnswer:", fuse=fuse)
    server.complete(asked, max_tokens=8, temperature=0)


def _converse(server: rag.Server, text: str) -> None:
    """Three turns about one document."""
    messages = [{"role": "system", "content": SYSTEM}]
    for question in (f"{text}\n\n{QUESTIONS[0]}", *QUESTIONS[1:]):
        messages.append({"role": "user", "content": question})
        body = {"model": server.model, "messages": messages, "max_tokens": 8, "temperature": 0}
        answer = server.call("/v1/chat/completions", body)
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})


def _misbehave(server: rag.Server) -> None:
    """Hints that cannot be, and a model that is not there."""
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 1, "kv_transfer_params": {"ragkv": 5}}
    server.call("/v1/completions", body)
    try:
        server.call("/v1/completions", {"model": "nobody", "prompt": "Hello", "max_tokens": 1})
    except RagKVError:
        return
    raise AssertionError("a model that is not there has answered")
