"""Retrieved passages in changing order: what stands first is reused exactly, the others are moved and fused.

    python examples/retrieval.py passages/*.txt --url http://localhost:8000

The passages should have been prefilled before: `ragkv ingest passages/*.txt --system-prompt … --whole`.
"""

import argparse
from pathlib import Path

from openai import OpenAI

from ragkv import rag

SYSTEM = "Answer from the passages, in a few words."
QUESTION = "Question: what were net sales?\nAnswer:"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("passages", type=Path, nargs="+")
    parser.add_argument("--url", default="http://localhost:8000")
    given = parser.parse_args()

    server = rag.Server(given.url)
    client = OpenAI(base_url=f"{given.url}/v1", api_key="-")
    passages = [(file.name, file.read_text()) for file in reversed(given.passages)]
    asked = rag.prompt(server, SYSTEM, passages, QUESTION)
    answer = client.completions.create(
        model=client.models.list().data[0].id, prompt=asked.token_ids, max_tokens=16, extra_body=asked.extra_body
    )
    print(answer.choices[0].text.strip())
    for each in answer.model_dump()["kv_transfer_params"]["ragkv"]["documents"]:
        print(f"{each['id']}: {each['decision']}, {each['reused_tokens']} tokens reused")


if __name__ == "__main__":
    main()
