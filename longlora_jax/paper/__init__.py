"""The paper's tables in miniature: the same comparisons on the shipped model, each row a run of train.py."""
