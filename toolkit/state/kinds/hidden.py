"""What the model's last layer says of a token: what its head reads, and a multi-token prediction layer.

As with ``routing``: prefix hits, forks, swaps and truncations bring a token's hidden state along with its other state.
"""

from toolkit.state.kinds.token_rows import TokenRows


class Hidden(TokenRows, kind="hidden"):
    """hidden states [num_blocks, block_size, 1, H] behind the final norm; spec.shapes: (1, H).

    There is one for a model, as of layer 0. Nothing of the model's own forward reads it.
    """

    op = "record_hidden"
