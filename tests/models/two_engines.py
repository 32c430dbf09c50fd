"""Two engines of one server (data parallel 2), asked in turn: `python -m models.two_engines`, with `arguments`,
`prompt`, and `tokens` as JSON on the standard input. Prints, for each engine and twice, an answer's tokens and how
many of the prompt's were not computed."""

import asyncio
import json
import sys


async def ask_both(arguments, prompt, tokens):
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, data_parallel_size=2))
    greedy = SamplingParams(
        temperature=0, max_tokens=tokens, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    found = []
    try:
        for number in range(4):
            given = TokensPrompt(prompt_token_ids=prompt)
            async for answer in llm.generate(given, greedy, f"{number}", data_parallel_rank=number // 2):
                found.append((answer.outputs[0].token_ids, answer.num_cached_tokens))
            await llm.reset_prefix_cache()
    finally:
        llm.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask_both(**json.load(sys.stdin)))))
