"""L_SAGE, the training loop and its checkpoints (stage `finetune`)."""
