"""Programs that prepare what methods and evaluations read: one command makes one input."""

# Name of the tokens that a model generates itself, where other tokens have the name of their dataset.
GENERATED = "generated"
