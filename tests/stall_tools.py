"""What the tests of `internal stall` and `hints` share: an engine whose steps take as long as the test says."""

from types import SimpleNamespace

from fusion_bench_tools import Words

STEP, LOAD = 1.0, 1.5  # seconds: of any step; of that in which a second prompt is loaded


class Tokenizer(Words):
    """Words."""

    def encode(self, text, add_special_tokens=False):
        return super().encode(text, add_special_tokens)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class StepEngine:
    """vLLM's engine: each step gives every running request a token. `took`: seconds beyond a step's own that the
    first one with the second prompt takes, of its sampling parameters and its tokens."""

    def __init__(self, clock, took, cached=lambda tokens: 0):
        self.llm_engine = self
        self._clock, self._took, self._cached = clock, took, cached
        self._running, self._hits = {}, 0

    def add_request(self, name, prompt, sampling):
        self._running[name] = sampling.max_tokens
        if name == "second":
            tokens = prompt["prompt_token_ids"]
            self._clock.now += self._took(sampling, tokens)
            self._hits = self._cached(tokens)

    def step(self):
        self._clock.now += STEP
        outputs = [SimpleNamespace(request_id=name, num_cached_tokens=self._hits) for name in self._running]
        self._running = {name: left - 1 for name, left in self._running.items() if left > 1}
        return outputs

    def abort_request(self, names):
        for name in names:
            self._running.pop(name)

    def has_unfinished_requests(self):
        return bool(self._running)


class Side:
    """An engine of the benchmark."""

    clock = Clock()

    def __init__(self, options):
        self.reuses = options.ragkv is not None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def evict(self):
        return None

    def ask(self, prompts):
        return []
