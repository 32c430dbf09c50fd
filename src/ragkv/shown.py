"""Text from elsewhere (keys, labels, file names, answers of servers), made safe to show on a terminal."""


def printable(text: str, keep: str = "") -> str:
    """A text with an escape such as "\\x1b" for each character that is not printable and not in `keep`."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
