"""What configurations of transformers say of a cache."""

from typing import Any


def head_sizes(config: Any) -> tuple[int | None, int | None]:
    """Heads of keys and values, and channels of each; None where the text model's configuration
    does not say."""
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    return shared, size
