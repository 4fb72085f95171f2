"""The label of tokens that are not trained on, and choices of flags, which must be known without slow imports."""

IGNORE_INDEX = -100  # ignored by the loss
TEMPLATES = ("vicuna", "tokenizer")  # chat templates: the original project's, or the model's own
BOS, EOS = ("each", "first", "none"), ("each", "none")  # documents of a token file that <s> precedes, </s> follows
