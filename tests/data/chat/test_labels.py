"""What each token counts in the loss."""

import numpy as np
import pytest

from llama_lib.data.chat.labels import label_weights
from llama_lib.data.chat.roles import ASSISTANT, SYSTEM, TEMPLATE, TEXT, UNTRAINED, USER

ROLES = np.array([TEMPLATE, SYSTEM, TEMPLATE, USER, TEMPLATE, ASSISTANT], np.uint8)


@pytest.mark.parametrize(
    ("loss_role", "other", "expected"),
    [
        ("assistant", 0.0, [0, 0, 0, 0, 0, 1]),
        ("assistant", 0.1, [0, 0.1, 0, 0.1, 0, 1]),
        ("user", 0.0, [0, 0, 0, 1, 0, 0]),
        ("user", 0.25, [0, 0.25, 0, 1, 0, 0.25]),
        ("all", 0.0, [0, 1, 1, 1, 1, 1]),
        ("all", 0.5, [0, 1, 1, 1, 1, 1]),
    ],
)
def test_weights_of_each_role(loss_role: str, other: float, expected: list[float]) -> None:
    weights = label_weights(ROLES, loss_role, other)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.array(expected, np.float32))


@pytest.mark.parametrize("loss_role", ["assistant", "user", "all"])
def test_text_is_always_trained_on(loss_role: str) -> None:
    text = np.full(4, TEXT, np.uint8)
    assert label_weights(text, loss_role, 0.0).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("loss_role", ["assistant", "user", "all"])
def test_untrained_turns_never_count(loss_role: str) -> None:
    roles = np.array([TEMPLATE, UNTRAINED, UNTRAINED, ASSISTANT], np.uint8)
    assert label_weights(roles, loss_role, 1.0).tolist()[1:] == [0, 0, 1]


def test_first_token_is_nobodys_label() -> None:
    assert label_weights(np.array([ASSISTANT, ASSISTANT], np.uint8), "assistant", 0).tolist() == [
        0,
        1,
    ]
    assert label_weights(np.empty(0, np.uint8), "assistant", 0.0).shape == (0,)
