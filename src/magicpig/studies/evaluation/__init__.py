"""What sampled attention does to answers: tasks with known answers, and the runs that compare samplers on them."""
