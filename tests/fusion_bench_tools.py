"""Tokenizers for the tests of `internal fusion`."""

import re

VOCABULARY = {"": 0, "<bos>": 1}


class Words:
    """A tokenizer with a token a word, a blank line, or a space."""

    bos_token_id = 1
    chat_template = None

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [VOCABULARY.setdefault(word, len(VOCABULARY)) for word in re.findall(r"\n\n| ?\S+|\s", text)]

    def decode(self, tokens, **_):
        return text_of(tokens)


class Talker(Words):
    """One with a chat template."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{each['role']}>{each['content']}</>" for each in messages) + "<assistant>"


def text_of(tokens):
    words = list(VOCABULARY)
    return "".join(words[token] for token in tokens)
