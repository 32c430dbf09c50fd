"""The engines that ragkv plugs into."""
