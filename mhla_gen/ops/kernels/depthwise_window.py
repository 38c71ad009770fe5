"""Where a convolution's tokens are, if ranks share a sequence: own ones, and others' beside them.

A `window` is None if the tokens are all those of the grid. Else the grid is that of the planes in
which own tokens lie, and the window is (the place on it of the first own token, number of own
tokens, number received before them, number received after them, strides of the received ones along
batch and tokens). Received tokens are one tensor, first those from before.
"""

import triton
import triton.language as tl


@triton.jit
def own_tokens(places, valid, window):
    """Tokens at places of the grid, counted from the first own one; which valid ones are own."""
    if window is not None:
        places -= window[0]
        valid = valid & (places >= 0) & (places < window[1])
    return places, valid


@triton.jit
def read_shared(x_ptr, x_token, halo_ptr, places, channels, valid, window):
    """Tokens at places of the grid, own or received; 0 where there is neither."""
    origin, seq_len, before, after, _batch, halo_token = window
    tokens = places - origin
    own = (tokens >= 0) & (tokens < seq_len)
    received = tokens + before - tl.where(tokens < 0, 0, seq_len)
    x_ptrs = x_ptr + tl.cast(tokens, tl.int64) * x_token + channels
    halo_ptrs = halo_ptr + tl.cast(received, tl.int64) * halo_token + channels
    valid = valid & (tokens >= -before) & (tokens < seq_len + after)
    return tl.load(tl.where(own, x_ptrs, halo_ptrs), mask=valid, other=0.0)
