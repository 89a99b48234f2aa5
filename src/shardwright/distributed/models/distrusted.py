"""Plans that are not exact, found by ``make zoo`` with transformers 5.23. A type that is mended can be taken out."""

# Model type of the text config -> what is wrong with the plan of transformers; it is read off the dataflow instead.
DISTRUSTED = {"doge": "the code around its cut layers expects all heads"}

# Model type -> why no plan is used: neither the one of transformers nor the one read off the dataflow is exact.
NOT_CUT = {
    "inkling_text": "its experts and short convolutions are not understood",
    "inkling2_text": "its experts and short convolutions are not understood",
}
