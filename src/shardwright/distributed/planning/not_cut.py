"""Model types that no known plan is exact for, found by ``make zoo`` with transformers 5.23.

Most plans that are not exact are found out by :mod:`.replay_check`. Not these: it does not look inside of experts.
"""

# Model type -> why no plan is used: neither the one of transformers nor the one read off the dataflow is exact.
NOT_CUT = {
    "inkling_text": "its experts and short convolutions are not understood",
    "inkling2_text": "its experts and short convolutions are not understood",
}
