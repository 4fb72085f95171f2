"""The label of tokens that are not trained on."""

IGNORE_INDEX = -100  # ignored by the loss
