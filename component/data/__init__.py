"""Which label marks a token that is not trained on?"""

IGNORE_INDEX = -100  # labels of this value are left out of the loss
