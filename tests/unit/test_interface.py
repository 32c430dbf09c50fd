"""The connector against vLLM's interface: the installed one by inspection, and that of 0.33 by a list."""

import inspect

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from ragkv.connectors.vllm.connector import RagKVConnector

# Methods of KVConnectorBase_V1 and SupportsHMA in vLLM 0.33, and what they are called with ("=": may be left out).
INTERFACE = {
    "request_finished_all_groups": ("abstract", "request block_ids"),
    "supports_divergent_local_hybrid_hits": ("property", ""),
    "requires_kv_delivery": ("property", ""),
    "supports_sleep_mode": ("class", "kv_transfer_config"),
    "role": ("property", ""),
    "get_mem_pool_context": ("method", ""),
    "bind_connector_metadata": ("method", "connector_metadata"),
    "clear_connector_metadata": ("method", ""),
    "_get_connector_metadata": ("method", ""),
    "has_connector_metadata": ("method", ""),
    "register_kv_caches": ("method", "kv_caches"),
    "unregister_kv_caches": ("method", ""),
    "restore_kv_caches": ("method", ""),
    "set_host_xfer_buffer_ops": ("method", "copy_operation"),
    "finish_forward": ("method", ""),
    "reset_capture_state": ("method", ""),
    "handle_preemptions": ("method", "kv_connector_metadata"),
    "start_load_kv": ("abstract", "forward_context **kwargs"),
    "wait_for_layer_load": ("abstract", "layer_name"),
    "save_kv_layer": ("abstract", "layer_name kv_layer attn_metadata **kwargs"),
    "wait_for_save": ("abstract", ""),
    "get_finished": ("method", "finished_req_ids"),
    "get_transfer_results": ("method", "finished_req_ids"),
    "get_block_ids_with_load_errors": ("method", ""),
    "shutdown": ("method", ""),
    "get_kv_connector_stats": ("method", ""),
    "get_kv_connector_kv_cache_events": ("method", ""),
    "get_handshake_metadata": ("method", ""),
    "build_connector_worker_meta": ("method", ""),
    "bind_kv_cache_manager": ("method", "kv_cache_manager"),
    "bind_gpu_block_pool": ("method", "gpu_block_pool"),
    "get_loaded_kv_cache_group_ids": ("method", "request"),
    "get_num_new_matched_tokens": ("abstract", "request num_computed_tokens"),
    "get_external_cache_hit_sources": ("method", "request num_external_tokens"),
    "update_state_after_alloc": ("abstract", "request blocks num_external_tokens"),
    "build_connector_meta": ("abstract", "scheduler_output"),
    "on_new_request": ("method", "request"),
    "update_connector_output": ("method", "connector_output"),
    "request_finished": ("method", "request block_ids"),
    "register_finished_partial_tail": ("method", "request block_ids partial_tail_offloads"),
    "take_events": ("method", ""),
    "has_pending_block_frees": ("method", ""),
    "has_pending_push_work": ("method", ""),
    "get_required_kvcache_layout": ("class", "vllm_config"),
    "requires_piecewise_for_cudagraph": ("class", "extra_config"),
    "get_finished_count": ("method", ""),
    "build_kv_connector_stats": ("class", "data="),
    "set_xfer_handshake_metadata": ("method", "metadata"),
    "set_xfer_handshake_metadata_pp_aware": ("method", "metadata"),
    "build_prom_metrics": ("class", "vllm_config metric_types labelnames per_engine_labelvalues"),
    "reset_cache": ("method", ""),
}
NEW = {"supports_sleep_mode", "unregister_kv_caches", "restore_kv_caches"}
OURS = {
    *("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output"),
    *("request_finished", "request_finished_all_groups", "get_external_cache_hit_sources", "reset_cache"),
    *("register_kv_caches", "get_handshake_metadata", "set_xfer_handshake_metadata", "start_load_kv"),
    *("wait_for_layer_load", "save_kv_layer", "wait_for_save", "get_finished", "get_block_ids_with_load_errors"),
    *("build_connector_worker_meta", "get_kv_connector_stats", "build_kv_connector_stats", "build_prom_metrics"),
    *("bind_connector_metadata", "set_xfer_handshake_metadata_pp_aware", "shutdown", *NEW),
}


def parameters(method):
    """As the list writes them."""
    told = []
    for each in list(inspect.signature(method).parameters.values()):
        star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        optional = each.default is not each.empty or each.kind is each.KEYWORD_ONLY
        told.append(star + each.name + ("=" if optional else ""))
    return " ".join(told[1:] if told[:1] == ["self"] else told)


def methods(cls):
    """Public methods that a class has of its own."""
    return {
        name: getattr(cls, name)
        for name, value in vars(cls).items()
        if callable(getattr(cls, name)) and not name.startswith("__") and not isinstance(value, type)
    }


def calls(arguments):
    """The shortest and the longest call that the list allows."""
    words = [word for word in arguments.split() if not word.startswith("*")]
    named = {word.strip("=") for word in words}
    return {word for word in words if not word.endswith("=")}, named


@pytest.mark.parametrize(("name", "told"), INTERFACE.items())
def test_every_call_of_0_33_is_taken(name, told):
    kind, arguments = told
    ours = vars(RagKVConnector).get(name)
    if ours is None or kind == "property":  # as vLLM's base has it
        assert kind != "abstract" and name not in NEW
        return
    assert isinstance(ours, classmethod) == (kind == "class")
    signature = inspect.signature(getattr(RagKVConnector, name))
    for call in calls(arguments):
        positional = [None] * len([word for word in arguments.split() if word.strip("=") in call])
        if kind != "class":
            positional.insert(0, None)
        signature.bind(*positional)
        names = dict.fromkeys(call)
        signature.bind(*([] if kind == "class" else [None]), **names)


def test_we_have_methods_of_our_own_for_all_that_matters():
    assert vars(RagKVConnector).keys() >= OURS
    assert INTERFACE.keys() >= OURS


def test_nothing_abstract_is_left():
    assert not RagKVConnector.__abstractmethods__
    abstract = {name for name, (kind, _) in INTERFACE.items() if kind == "abstract"}
    assert vars(RagKVConnector).keys() >= abstract


def test_the_list_is_of_the_same_kind_as_the_installed_interface():
    """What both have is called alike: else the list is wrong, or the installed one is to be looked at."""
    installed = methods(KVConnectorBase_V1) | methods(SupportsHMA)
    common = installed.keys() & INTERFACE.keys()
    assert len(common) > 25
    assert {name: parameters(installed[name]) for name in common} == {name: INTERFACE[name][1] for name in common}


def test_every_public_method_of_ours_is_one_that_vllm_calls():
    known = INTERFACE.keys() | methods(KVConnectorBase_V1).keys() | methods(SupportsHMA).keys()
    assert {name for name in methods(RagKVConnector) if not name.startswith("_")} <= known


def test_sleep_is_supported():
    assert RagKVConnector.supports_sleep_mode(None) is True
