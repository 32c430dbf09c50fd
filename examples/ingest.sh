#!/bin/sh
# Prefill passages behind the system prompt that requests will have, before anybody asks about them.
#     examples/ingest.sh http://localhost:8000 passages/*.txt
set -eu
url=$1
shift
exec ragkv ingest "$@" --url "$url" --whole --journal ingested.jsonl \
    --system-prompt "Answer from the passages, in a few words."
