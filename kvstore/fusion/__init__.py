"""Fusion: reuse of KV at another position, mended by recomputing some of its tokens (CacheBlend, EuroSys 2025)."""
