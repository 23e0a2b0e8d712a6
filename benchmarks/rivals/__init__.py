"""What our training is measured against: the same recipe by transformers' Trainer and by hand."""
