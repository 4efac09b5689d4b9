"""Step 1: the digits, checked and split, as a user without Torchrelay would write it."""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

digits = load_digits()
images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
if images.max() > 16 or set(labels.tolist()) != set(range(10)):
    sys.exit("these are not the digits")
rest, test_images, rest_labels, test_labels = train_test_split(images, labels, test_size=0.25, random_state=1)
train_images, val_images, train_labels, val_labels = train_test_split(rest, rest_labels, test_size=0.2, random_state=1)
folder = Path("work/prepared")
folder.mkdir(parents=True, exist_ok=True)
np.savez(folder / "train.npz", instances=train_images, labels=train_labels)
np.savez(folder / "val.npz", instances=val_images, labels=val_labels)
np.savez(folder / "test.npz", instances=test_images, labels=test_labels)
