"""Training is reproducible bit for bit, and what is loaded answers as what was trained."""

import math

import numpy as np
import pytest
import torch

import model
import train


def part(count: int) -> train.Part:
    draw = torch.Generator().manual_seed(5)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 60, (count, 28, 28), generator=draw, dtype=torch.uint8)
    # A bar whose row tells the class: learnable in a few steps.
    for row, label in enumerate(labels.tolist()):
        images[row, 2 * label + 4] = 255
    return train.Part(images, labels)


def fit(seed: int = 1, epochs: int = 2):
    recipe = train.Recipe(epochs=epochs, batch_size=32, width=4, shift=1, seed=seed, dropout=0.1)
    return train.fit(recipe, part(200), part(40), lambda *_: None)


def test_a_rerun_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        model.save(fit()[0], tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    model.save(fit(seed=2)[0], tmp_path / "other")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


def test_it_learns():
    _, history = fit(epochs=12)
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["val_accuracy"] > 0.5


@pytest.mark.parametrize("lost", ["train_loss", "val_loss"])
def test_a_loss_that_is_no_number_ends_the_training(lost):
    metrics = {"train_loss": 0.5, "val_loss": 0.6}
    train.require_finite(1, metrics)
    for value in (math.nan, math.inf):
        with pytest.raises(train.DivergedError, match=f"epoch 3 {lost} is"):
            train.require_finite(3, metrics | {lost: value})


def test_folding_batch_norms_keeps_the_answers(tmp_path):
    trained, _ = fit()
    model.save(trained, tmp_path / "model.safetensors")
    loaded = model.load(tmp_path / "model.safetensors")
    images = part(20).images
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), trained(images), atol=1e-4, rtol=1e-4)


def test_an_augmented_image_is_a_moved_or_mirrored_one():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 10, 7] = 200
    moved = train.augment(image.expand(64, 28, 28), 2, torch.Generator().manual_seed(0))
    assert moved.shape == (64, 28, 28)
    assert (moved.sum((1, 2)) == 200).all()
    columns = {int(where[2]) for where in moved.nonzero()}
    assert columns <= {5, 6, 7, 8, 9, 18, 19, 20, 21, 22}
    assert len(columns) > 5


def test_the_schedule_rises_and_ends_at_nothing():
    rates = [train.one_cycle(step / 100) for step in range(101)]
    assert max(rates) == rates[25] == 1
    assert rates[0] > 0
    assert np.isclose(rates[100], 0)


def test_golden_samples_take_the_classes_in_turn(tmp_path):
    trained, _ = fit()
    model.save(trained, tmp_path / "model.safetensors")
    data = part(50)
    np.savez(tmp_path / "test.npz", instances=data.images.numpy(), labels=data.labels.numpy().astype(np.uint8))
    predictor = train.Predictor(tmp_path)
    golden = train.record_golden(predictor, tmp_path / "test.npz", 12, 1e-4)
    rows = [np.argmax([sum(row) for row in instance]) for instance in golden["instances"]]
    assert [(int(row) - 4) // 2 for row in rows] == [*range(10), 0, 1]
    evaluation, confusion = train.evaluate(predictor, tmp_path / "test.npz")
    assert len(evaluation["scores"]) == len(evaluation["slices"]["class"]) == confusion.sum() == 50
