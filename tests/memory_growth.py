"""What a call leaves behind in Python's memory."""

import gc
import tracemalloc


def grown(run):
    """Bytes more than before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
