"""The demo: a real language model converted, trained on shipped triplets, and scored."""
