"""How much each token of a conversation counts as a label.

Invariant: weights belong to the label's own token, not to the one in front of it; the model's loss
does the shift.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_lib.data.chat.roles import ASSISTANT, ROLE_NAMES, SYSTEM, TEMPLATE, TEXT, USER

_TURNS = (ASSISTANT, USER, SYSTEM)


def label_weights(
    roles: npt.NDArray[np.uint8], loss_role: str, other_role_weight: float
) -> npt.NDArray[np.float32]:
    """The weights [tokens] of one conversation's labels, from its roles [tokens]; 0 is no loss.

    `loss_role` is assistant, user or all. Turns of a role that is not trained on count
    `other_role_weight`, what the template writes around them nothing. With `all` every token
    counts one, the template's too. TEXT always counts one, UNTRAINED never. The first token is
    nobody's label.
    """
    by_role = np.zeros(len(ROLE_NAMES), np.float32)
    by_role[TEXT] = 1
    if loss_role == "all":
        by_role[[TEMPLATE, *_TURNS]] = 1
    else:
        by_role[list(_TURNS)] = other_role_weight
        by_role[{"assistant": ASSISTANT, "user": USER}[loss_role]] = 1
    weights: npt.NDArray[np.float32] = by_role[roles]
    weights[:1] = 0
    return weights
