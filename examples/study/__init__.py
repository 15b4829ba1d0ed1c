"""Parts of `pruning_study.py`: what is measured, how, and the report."""
