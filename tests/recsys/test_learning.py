"""F11, H4: what epochs and iterations say, in a sentence and in a drawing."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fusion.config import Part
from fusion.training.member import CLASSIFIERS
from fusion.types import History
from recsys.fitting import Fitted
from recsys.learning import hint, learning_of
from recsys.report import ReportExtras, write_report


def history(
    metric: Sequence[float], loss: Sequence[float], best: int, stopped: str = History.stopped, *, higher: bool = True
) -> History:
    name = "accuracy" if higher else "log_loss"
    rows = [
        {"epoch": epoch, "train_loss": one, name: value}
        for epoch, (value, one) in enumerate(zip(metric, loss, strict=True), 1)
    ]
    return History(rows, best, stopped, name, higher)


FALLING = [1.0, 0.5, 0.4, 0.3, 0.2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        # By hand: after .80 the mean of .78, .76 and .74 is .76, 5 % below; the loss falls from .5 to .2, by 60 %.
        (history([0.6, 0.8, 0.78, 0.76, 0.74], FALLING, 1), r"over-fits: after epoch 2, .* another 60.0 % .* by 5.0 %"),
        (history([0.6, 0.8, 0.80, 0.79, 0.79], FALLING, 1), "^$"),  # worse by less than 2 %
        (history([0.6, 0.8, 0.7, 0.7, 0.7], [1.0, 0.5, 0.5, 0.49, 0.48], 1), "^$"),  # noise: the loss stood still
        # Of 5 epochs the last 2 are recent: .80 after .70 is a gain of 14.3 %.
        (history([0.5, 0.6, 0.7, 0.75, 0.8], FALLING, 4), r"accuracy gained 14.3 % in the last 2 of 5 epochs. Raise"),
        (history([0.5, 0.6, 0.7, 0.75, 0.8], FALLING, 4, "target reached: accuracy 0.8"), "^$"),
        (history([0.5, 0.6, 0.8, 0.79, 0.803], FALLING, 4), "^$"),  # a gain of less than 1 %
        (history([0.9, 0.7, 0.6, 0.55, 0.5], FALLING, 4, higher=False), r"log_loss gained 16.7 %"),
        (history([0.9, 0.5, 0.6, 0.7, 0.8], FALLING, 1, higher=False), r"over-fits.* log_loss was .* worse by 40.0 %"),
        (history([0.5, 0.5, 0.5], [1.0, 0.999, 0.995], 0), r"next to nothing: the training loss fell by 0.5 % in 3"),
        (history([0.1, 0.9], [1.0, 0.1], 1), "^$"),  # too short to judge
        (History([{"epoch": 1, "train_loss": 1.0}] * 3, 2), "next to nothing"),  # nothing was validated
        (History([{"epoch": 1, "train_loss": -1.0 * n} for n in (1, 2, 3)], 2), "next to nothing|^$"),
    ],
)
def test_a_hint_says_what_to_change(given: History, words: str) -> None:
    """F11: the thresholds that `recsys.learning` documents."""
    assert re.search(words, hint(given).replace("\N{NO-BREAK SPACE}", " "))


def test_the_page_draws_how_members_and_rules_learned(tmp_path: Path) -> None:
    """F11, H4: hints in words, the kept epoch as a dashed line, rates and conflicts left out; what a rule's fitting
    minimised beside them. Members that were trained together share one sentence."""
    given = history([0.6, 0.8, 0.78, 0.76, 0.74], FALLING, 1)
    given.epochs[0] |= {"learning_rate/head": 0.1, "conflict/text": 0.5}
    start = {"from": "runs/a/submodels/text", "taken": ["x/kernel", "x/bias"], "new": ["logits/kernel [8, 3]"]}
    part = Part("neural", None, CLASSIFIERS)
    fitted = {
        "text": Fitted(None, part, tmp_path, given, 1.0, start=start),
        "image": Fitted(None, part, tmp_path, given, 1.0),
        "tree": Fitted(None, part, tmp_path, History(stopped="not trained in epochs"), 1.0),
    }
    learning = learning_of(fitted)
    assert set(learning) == {"text", "image"} and learning["text"]["best_epoch"] == 2
    assert learning["text"]["monitor"] == "accuracy"
    extras = ReportExtras(
        "accuracy",
        learning_curves={"text": given.epochs},
        rule_histories={"gate": [4.2, 4.1, 4.05], "still": [3.0]},
    )
    write_report(tmp_path, {"learning": learning}, extras)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("over-fits: after epoch 2") == 1 and "<b>text, image</b>" in html
    assert "text started from runs/a/submodels/text: 2 arrays taken, new are logits/kernel [8, 3]." in html
    codes = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", html)
    curves, fitting = (base64.b64decode(code).decode() for code in codes)
    assert curves.count("stroke-dasharray") == 2, "a line in either drawing"
    assert "accuracy" in curves and "learning_rate" not in curves and "conflict" not in curves
    assert "gate" in fitting and "still" not in fitting and "iteration" in fitting
