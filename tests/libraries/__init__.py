"""Beside the libraries that people serve and tune models with (`make test-libraries` installs them).

Each of them changes a model before this backend sees it. Logits under a plan must be those of a plain model with the
same weights, under the same plan.
"""
