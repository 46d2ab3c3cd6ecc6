"""attend: rows and log u -> AttentionState; merge of states; exact attention is the case u = 1."""
