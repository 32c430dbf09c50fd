"""The model of random weights that most engine tests run: every token of a prompt decides its answers."""

import random

PAIRS, ANSWER = 200, 8


def changed(prompt, chance):
    """The prompt with another token at its sixth place."""
    return [*prompt[:5], 1000 + (prompt[5] + chance.randrange(1, 30_000)) % 40_000, *prompt[6:]]


def test_one_early_token_decides_the_answer(plain):
    chance = random.Random(0)
    for length, pairs in ((48, PAIRS), (1500, 3)):
        prompts = [[chance.randrange(1000, 41_000) for _ in range(length)] for _ in range(pairs)]
        others = [changed(prompt, chance) for prompt in prompts]
        answers = [answer.tokens for answer in plain.ask([*prompts, *others], ANSWER)]
        differing = sum(one != other for one, other in zip(answers[:pairs], answers[pairs:], strict=True))
        assert differing >= 0.95 * pairs, f"{differing} of {pairs} pairs of {length} tokens"
        assert len(set(answers)) >= 0.95 * len(answers)
