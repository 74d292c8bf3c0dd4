"""Methods around a pair loss, exact functions of arrays: annotator types, rounds, preference models, ratings."""
