"""sketch: keys -> codes of a few bits, scores from them, and a sample whose probabilities follow from the scores."""
