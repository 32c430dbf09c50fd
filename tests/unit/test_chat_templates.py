"""Chats of several turns with retrieval in each, in templates of the kinds that models have: what is exact.

The templates are ours, in the shape of those of SmolLM2 and Qwen (ChatML), Qwen 3 (which takes thinking out of the
history), Llama 3, Mistral and Gemma.
"""

import itertools
import json

import jinja2
import pytest

from fake_vllm import ToyTokenizer
from ragkv.config.settings import FusionSettings
from ragkv.passages import located
from toy_engine import BREAK, Engine, closing

CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
THINKING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}")
LLAMA = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} "
    "{{ m.content }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m.role != 'system' %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else 'user' }}\n{% if loop.index0 == 1 %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}<start_of_turn>model\n"
)
CLOSED = {"chatml": (CHATML, "<|im_end|>"), "llama": (LLAMA, "<|eot_id|>"), "gemma": (GEMMA, "<end_of_turn>")}
SYSTEM = "Answer from the passages, in a few words."
WORDS = ("rain", "snow", "wind", "hill", "river", "bridge", "night", "day", "west", "east", "mill", "barn", "road")
PASSAGES = [
    " ".join(f"{word}{number} {other}" for word, other in itertools.islice(itertools.product(WORDS, WORDS), 9, 60))
    for number in range(5)
]


class Chat:
    """A server with a template: its tokenizer, and an engine whose KV is checked."""

    def __init__(self, engine, template, tools=()):
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        self.template, self.tools, self.engine = environment.from_string(template), tools, engine
        self.tokenizer = ToyTokenizer(bos=False)

    def encode(self, text, *, add_special_tokens=False):
        """A blank line is a break, as in the engine's vocabulary."""
        parts = (self.tokenizer.encode(part) for part in text.split("\n\n"))
        tokens = [[each + 100 for each in part] for part in parts]
        return [token for part in tokens for token in [*part, BREAK]][:-1]

    def prompt(self, messages):
        return self.encode(self.template.render(messages=messages, tools=self.tools))

    def ask(self, messages, answer, shown, **more):
        """One turn: how much was hit, the prompt, and what the response told."""
        prompt, answer = self.prompt(messages), self.encode(answer)
        spans = located(self, prompt, [PASSAGES[number] for number in shown])
        assert len(spans) == len(shown), "each passage is found in the template"
        hints = {"documents": spans, "fuse": False, **more}
        hit = self.engine.run(prompt, answer, kv_transfer_params={"ragkv": hints})
        return hit, prompt, prompt + answer


def user(numbers, question):
    return {"role": "user", "content": "\n\n".join([*(PASSAGES[n] for n in numbers), question])}


def talk(chat, answers, end="", **more):
    """Three turns with passages of their own: each turn's hit, and what it shares with the turn before."""
    messages, known, hits = [{"role": "system", "content": SYSTEM}], [], []
    for numbers, answer in zip(((0, 1), (2,), (3, 0)), answers, strict=True):
        messages.append(user(numbers, f"Why {WORDS[numbers[0]]}?"))
        shown = sorted({n for each in messages for n in range(5) if PASSAGES[n] in each["content"]})
        hit, prompt, whole = chat.ask(messages, answer + end, shown, **more)
        hits.append((hit, shared(known, prompt), len(prompt)))
        known = whole
        messages.append({"role": "assistant", "content": answer})
    return hits


def shared(one, other):
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.fixture
def engine():
    fusion = FusionSettings(min_tokens=16)
    with closing(Engine(pages=3000, blocks=2000, fusion=fusion)) as made:
        yield made


ANSWERS = ("It was the west wind.", "In the night, by the mill.", "No.")


@pytest.mark.parametrize(("template", "end"), CLOSED.values(), ids=CLOSED)
def test_each_turn_goes_on_behind_the_last_answer(engine, template, end):
    hits = talk(Chat(engine, template), ANSWERS, end)
    first, *later = hits
    assert first[0] == 0
    for (hit, known, size), (_, _, before) in zip(later, hits, strict=False):
        assert before < hit == known - 1 < size, (
            "all but the answer's last token, which was sampled and not computed"
        )


def test_what_a_template_writes_otherwise_into_the_history_is_computed(engine):
    """Mistral's puts a space before an answer: its first token is another."""
    for hit, known, _ in talk(Chat(engine, MISTRAL), ANSWERS)[1:]:
        assert hit == known > 100


def test_thinking_that_a_template_strips_ends_what_is_exact(engine):
    thought = [f"<think>\nSome words about {word}.\n</think>\n\n{word}." for word in ("wind", "mill", "barn")]
    hits = talk(Chat(engine, THINKING), thought, "<|im_end|>")
    for (hit, known, size), (_, _, before) in zip(hits[1:], hits, strict=False):
        assert hit == known == before < size, "the last prompt is exact, and its answer is computed"


def test_tools_stand_first_and_so_must_not_change(engine):
    tools = [{"name": "search", "parameters": {"query": "text"}}, {"name": "sum", "parameters": {"of": "numbers"}}]
    chat = Chat(engine, CHATML, tools)
    messages = [{"role": "system", "content": SYSTEM}, user((0, 1), "Why?")]
    chat.ask(messages, "So.", (0, 1))
    assert chat.ask(messages, "So.", (0, 1))[0] == len(chat.prompt(messages)) - 1
    other = Chat(engine, CHATML, tools[::-1])
    other.tokenizer = chat.tokenizer
    hit, prompt, _ = other.ask(messages, "So.", (0, 1))
    assert hit == shared(chat.prompt(messages), prompt) < len(json.dumps(tools))


@pytest.mark.parametrize(("template", "end"), CLOSED.values(), ids=CLOSED)
def test_a_passage_that_returns_elsewhere_is_fused_where_that_is_asked_for(engine, template, end):
    """In a chat of its own: behind the system prompt all passages have moved."""
    chat = Chat(engine, template)
    talk(chat, ANSWERS, end)
    messages = [
        {"role": "system", "content": SYSTEM},
        user((3, 2, 1), "And what else was there, by the mill, then?"),
    ]
    hit, prompt, _ = chat.ask(messages, "Yes.", (1, 2, 3), fuse=True)
    (fusion,) = engine.fusions
    moved = sum(stop - start for start, stop in fusion.runs)
    assert moved > 0.8 * sum(len(chat.encode(PASSAGES[n])) for n in (1, 2, 3))
    assert fusion.start <= len(chat.encode(SYSTEM)) + 16 and hit == fusion.end < len(prompt)
