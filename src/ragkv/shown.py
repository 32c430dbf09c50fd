"""What others chose (keys, labels, names of files, answers of servers), as it may be shown on a terminal."""


def printable(text: str, keep: str = "") -> str:
    """A text in which control characters (but those in `keep`), halves of characters and whatever else is not
    shown as itself stand as escapes: "\\x1b"."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
