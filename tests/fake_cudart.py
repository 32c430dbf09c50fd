"""CUDA's runtime library, as far as registering host memory goes."""

from ragkv.connectors.vllm.pinning import ALREADY_REGISTERED


class Runtime:
    """Keeps what is registered, and the last error until it is taken. `errors`: by number of the call,
    what registering gives."""

    def __init__(self, errors=None):
        self.errors, self.pieces, self.last, self.calls = errors or {}, {}, 0, 0

    def cudaHostRegister(self, address, size, flags):
        error = self.errors.get(self.calls, 0)
        self.calls += 1
        if any(start <= address.value < start + length for start, length in self.pieces.items()):
            error = ALREADY_REGISTERED
        if not error:
            self.pieces[address.value] = size.value
        return self._note(error)

    def cudaHostUnregister(self, address):
        return self._note(0 if self.pieces.pop(address.value, None) else 713)

    def cudaGetLastError(self):
        error, self.last = self.last, 0
        return error

    def _note(self, error):
        self.last = error or self.last
        return error
