"""One module an op. Importing this package defines all of them."""

from .paged_attention import paged_attention
from .reshape_and_cache_flash import reshape_and_cache_flash
from .rms_norm import rms_norm

__all__ = ["paged_attention", "reshape_and_cache_flash", "rms_norm"]
