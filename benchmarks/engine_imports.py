"""What an engine imports: the process that engines are forked from loads it once. Nothing may run or start here."""

import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
