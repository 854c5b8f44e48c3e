"""What `s1kernels bench` and the benches of the repository share: correctness gates, timing, and what is made of it.

Nothing is timed that is not correct, and what cannot run is a row with its reason, never a number.
"""
