"""Keys whose hashes differ from run to run, as those of bytes and str do from process to process."""

from collections.abc import Hashable


class SaltedBytes(bytes):
    """Bytes with a hash of its own for every salt."""

    salt = 0

    def __hash__(self) -> int:
        return hash((self.salt, bytes(self)))


class SaltedText(str):
    """A text with a hash of its own for every salt."""

    salt = 0

    def __hash__(self) -> int:
        return hash((self.salt, str(self)))


def salted(number: int, salt: int) -> Hashable:
    """The key of a number: equal for all salts, with another hash for each."""
    key = SaltedBytes(b"%d" % number) if number % 2 else SaltedText(number)
    key.salt = salt
    return key
