"""What an engine imports. The process that engines are forked from loads it once; nothing may be started here."""

import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
