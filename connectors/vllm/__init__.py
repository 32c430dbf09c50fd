"""The connector for vLLM V1. Importing this package imports neither vLLM nor torch.

`register` is the entry point in `vllm.general_plugins`; vLLM calls it in every process of an engine.
"""

NAME = "RagKVConnector"


def register() -> None:
    """Make `"kv_connector": "RagKVConnector"` known to vLLM, and have its settings checked before weights load."""
    from ragkv.connectors.vllm.plugin import install

    install()
