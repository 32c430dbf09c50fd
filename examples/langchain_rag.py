"""LangChain: the passages first and the question last, so that each question reuses the KV of all passages.

    python examples/langchain_rag.py passages/*.txt --url http://localhost:8000

Needs `langchain-openai`. The hints in `extra_body` are optional: with them, a passage has the same chunks in every
prompt, and metrics of its own.
"""

import argparse
from pathlib import Path

from langchain_core.messages import convert_to_openai_messages
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from ragkv import rag

QUESTIONS = ("What were net sales?", "What are the main risks?")
PROMPT = ChatPromptTemplate([("system", "Answer briefly.\n\n{passages}"), ("human", "{question}")])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("passages", type=Path, nargs="+")
    parser.add_argument("--url", default="http://localhost:8000")
    given = parser.parse_args()

    server = rag.Server(given.url)
    model = server.models()[0]["id"]
    llm = ChatOpenAI(model=model, base_url=f"{given.url}/v1", api_key="-", max_completion_tokens=16)
    texts = [(file.name, file.read_text().strip()) for file in given.passages]
    for question in QUESTIONS:
        messages = PROMPT.format_messages(passages="\n\n".join(text for _, text in texts), question=question)
        hints = rag.chat(server, convert_to_openai_messages(messages), texts, fuse=None)
        answer = llm.invoke(messages, extra_body=hints.extra_body)
        usage = answer.usage_metadata
        reused = usage["input_token_details"].get("cache_read", 0)
        print(f"{question} {answer.text.strip()!r} ({reused} of {usage['input_tokens']} tokens reused)")


if __name__ == "__main__":
    main()
