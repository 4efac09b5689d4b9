"""The predictor: what it answers, what it refuses, and that saved weights come back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from handler import Predictor
from model import LABELS, Network, save


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    torch.manual_seed(1)
    save(Network(hidden=4), tmp_path / "model.safetensors")
    return Predictor(tmp_path)


def test_there_is_a_prediction_for_every_instance(predictor: Predictor) -> None:
    answers = predictor.predict(predictor.encode([[0.0, 1.0], [1, -0.5]]))
    assert len(answers) == 2
    for answer in answers:
        assert answer["label"] == LABELS[answer["class"]]
        assert sum(answer["probabilities"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "wrong",
    [[1.0], [1.0, 2.0, 3.0], 1.0, "ab", [1.0, None], [True, 1.0], [1.0, float("nan")], [1.0, 1e300], [1.0, [2.0]]],
)
def test_a_wrong_instance_is_refused_by_its_index(predictor: Predictor, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"instance 1: .*2 finite numbers"):
        predictor.encode([[0.0, 1.0], wrong])


def test_no_instance_and_no_json_are_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="empty"):
        predictor.encode([])
    with pytest.raises(ValueError, match="image/png"):
        predictor.decode(b"\x89PNG", "image/png")


def test_saved_weights_come_back_as_the_same_network_and_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = Network(hidden=4)
    save(network, tmp_path / "model.safetensors")
    first = (tmp_path / "model.safetensors").read_bytes()
    again = Predictor(tmp_path).network
    save(again, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == first
    assert torch.equal(network.eval()(torch.ones(1, 2)), again(torch.ones(1, 2)))
