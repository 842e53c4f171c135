"""Parts of the training example: corpus, optimizer step, checkpoints, progress, sampling."""
