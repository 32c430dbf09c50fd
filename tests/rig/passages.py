"""Passages in stored order: what an application asks, and what it then asks for."""

from rig.beside import Ask


def check_stored_order(rig, plain, fresh):
    """Of three passages two are stored as a chain: the engine says so, beside another request, and has them."""
    system, passages = fresh(20), [fresh(40) for _ in range(3)]

    def prompt(order):
        tokens, documents = list(system), []
        for number in order:
            start = len(tokens)
            tokens += passages[number]
            documents.append({"id": str(number), "start": start, "end": len(tokens)})
        return Ask((*tokens, *fresh(12)), hints={"documents": documents, "fuse": False})

    rig.answer(prompt((2, 0)).prompt, hints=prompt((2, 0)).hints)
    rig.evict()
    order = {"before": list(system), "passages": [list(each) for each in passages]}
    beside = Ask(fresh(50))
    other, found = rig.answers([beside, Ask(system[:1], 1, hints={"order": order, "store": False})])
    asked = {"passages": [2, 0, 1], "tokens": 120, "given_tokens": 0, "ordered_tokens": 80}
    assert found.told["order"] == asked and "problems" not in found.told
    rig.evict()
    ordered = prompt((2, 0, 1))
    warm = rig.answers([ordered])[0]
    assert warm.cached == 100 == warm.told["exact_tokens"] and warm.told["computed_tokens"] == 52
    plain.check([beside, ordered], [other, warm])
