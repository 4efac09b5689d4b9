"""What a request may hold, and what is said of one that may not."""

import io

import pytest
import torch
from PIL import Image

import model
from handler import Predictor

BLANK = [[0] * 28 for _ in range(28)]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    torch.manual_seed(0)
    model.save(model.Network(4), folder / "model.safetensors")
    return Predictor(folder)


def picture(kind: str, size: tuple[int, int] = (28, 28)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, 255).save(file, kind)
    return file.getvalue()


def test_every_instance_gets_a_prediction(predictor):
    bright = [[255] * 28 for _ in range(28)]
    answers = predictor.predict(predictor.encode([BLANK, bright, BLANK]))
    assert answers[0]["probabilities"] == pytest.approx(answers[2]["probabilities"])
    for answer in answers:
        assert answer["label"] == model.LABELS[answer["class"]]
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert max(answer["probabilities"]) == answer["probabilities"][answer["class"]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_an_instance(predictor, kind):
    (instance,) = predictor.decode(picture(kind), f"image/{kind.lower()}")
    assert predictor.encode([instance]).float().mean() == 255


@pytest.mark.parametrize(
    ("instance", "reason"),
    [
        (1, "shape"),
        ([1] * 28, "shape"),
        ([10**12] * 28, "shape"),
        (BLANK[:27], "shape"),
        ([*BLANK[:27], [0] * 27], "shape"),
        ({"image": BLANK}, "shape"),
        ("text", "shape"),
        ([*BLANK[:27], [256] * 28], "something else"),
        ([*BLANK[:27], [-1] * 28], "something else"),
        ([*BLANK[:27], [0.5] * 28], "something else"),
        ([*BLANK[:27], [None] * 28], "something else"),
        ([*BLANK[:27], ["a"] * 28], "something else"),
        ([*BLANK[:27], [[0]] * 28], "something else"),
    ],
)
def test_a_wrong_instance_is_named(predictor, instance, reason):
    with pytest.raises(ValueError, match=f"instance 1 .*{reason}.*28 rows of 28 whole numbers"):
        predictor.encode([BLANK, instance])


def test_no_instance_is_refused(predictor):
    with pytest.raises(ValueError, match="empty"):
        predictor.encode([])


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (b"", "image/png", "not a whole"),
        (picture("PNG")[:50], "image/png", "not a whole"),
        (picture("JPEG")[:-80], "image/jpeg", "not a whole"),
        (picture("PNG", (29, 28)), "image/png", "29×28"),
        (picture("GIF"), "image/png", "not a whole"),
        (picture("PNG"), "text/csv", "content type"),
    ],
)
def test_a_wrong_picture_is_refused(predictor, body, kind, reason):
    with pytest.raises(ValueError, match=reason):
        predictor.decode(body, kind)
