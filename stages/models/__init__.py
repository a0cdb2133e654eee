"""What the pipeline knows of models: how to open, prompt, run and score them."""
