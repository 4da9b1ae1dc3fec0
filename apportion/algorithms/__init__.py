"""What an algorithm is made of: credit methods, surrogates, reductions, shaping, selection, KL and corrections.

torch on the response axis and nothing of the machine: no actors, no models, no configuration. The parts' contract is
`interface`, the list of them `registry`.
"""
