"""Parts of `train_demo.py`: text, training, pruning and reports."""
