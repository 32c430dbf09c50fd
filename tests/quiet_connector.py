"""A connector that does nothing, for MultiConnector to have another beside ragkv's; it has a word of its own for
vLLM's handshake, as connectors that talk to other engines do."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)


@dataclass
class Word(KVConnectorHandshakeMetadata):
    text: str = "quiet"


class QuietConnector(KVConnectorBase_V1, SupportsHMA):
    def get_handshake_metadata(self):
        return Word()

    def set_xfer_handshake_metadata(self, metadata):
        assert all(isinstance(each, Word) for each in metadata.values()), "a word that is another's"

    def set_xfer_handshake_metadata_pp_aware(self, metadata):
        self.set_xfer_handshake_metadata(metadata)

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        assert num_external_tokens == 0

    def build_connector_meta(self, scheduler_output):
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request, block_ids):
        return False, None

    def start_load_kv(self, forward_context, **kwargs):
        pass

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass
