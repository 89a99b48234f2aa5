"""Plans of transformers that are not exact, found by ``make zoo``. For these types the plan is read off the dataflow.

Found with transformers 5.23; a type that a later version mends can be taken out.
"""

# Model type of the text config -> what is wrong.
DISTRUSTED = {
    "inkling_text": "its cut of the experts computes something else",
    "inkling2_text": "its cut of the experts computes something else",
    "doge": "the code around its cut layers expects all heads",
}
