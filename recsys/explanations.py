"""What of an example led a classifier to its answer, for the page of a run: words of a text, regions of an image.

Why an item is recommended, `recsys.reasons` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion.explain import region_shares, word_shares
from fusion.training.member import ClassifierMember
from recsys.thumbnails import aglow


def explaining(members: Mapping[str, Any], order: Sequence[str], modality: str) -> str | None:
    """The first of the members named in `order` that reads this modality and learned by gradient; None without one."""
    for name in order:
        member = members[name]
        if isinstance(member, ClassifierMember) and member.submodel.modality == modality and member.submodel.explained:
            return name
    return None


def reasons(member: ClassifierMember, value: Any, answer: int, truth: int) -> Sequence[tuple[str, float]] | np.ndarray:
    """What speaks for the class `answer` rather than for `truth`.

    Args:
        member: reads texts or images.
        value: one text, or one image uint8 `[H, W, 3]`.
        answer, truth: class numbers.

    Returns:
        Words with what each adds to the difference of the two logits; or the image, uint8 `[H, W, 3]`, aglow where it
        speaks for the answer.
    """

    def output(embedding: Any) -> Any:
        logits = member.classify(embedding)
        return logits[:, answer] - logits[:, truth]

    if member.submodel.modality == "text":
        return word_shares(member.submodel, value, output)
    return aglow(value, region_shares(member.submodel, value, output))
