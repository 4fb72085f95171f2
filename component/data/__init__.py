IGNORE_INDEX = -100  # labels of this value are left out of the loss
