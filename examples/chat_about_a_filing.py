"""Several questions about one long document, in one chat: each turn reuses the KV of all that was said before.

    python examples/chat_about_a_filing.py filing.txt --url http://localhost:8000

Nothing of ragkv is imported: a client needs to do nothing for exact reuse.
"""

import argparse
from pathlib import Path

from openai import OpenAI

QUESTIONS = ("What were net sales?", "What are the main risks?", "Who is the chief executive officer?")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("filing", type=Path)
    parser.add_argument("--url", default="http://localhost:8000")
    given = parser.parse_args()

    client = OpenAI(base_url=f"{given.url}/v1", api_key="-")
    model = client.models.list().data[0].id
    messages = [{"role": "system", "content": "Answer briefly.\n\n" + given.filing.read_text()}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=32)
        text, usage = answer.choices[0].message.content or "", answer.usage
        messages.append({"role": "assistant", "content": text})
        details = usage.prompt_tokens_details if usage else None
        cached = (details.cached_tokens or 0) if details else 0
        print(f"{question} {text.strip()!r} ({cached} of {usage.prompt_tokens if usage else 0} tokens reused)")


if __name__ == "__main__":
    main()
